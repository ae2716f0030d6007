# `make demo` and `make test` each build what they need, from nothing, in a virtual environment inside the project.
PYTHON ?= python3
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test lint bench clean

demo: .venv/demo.done
	OMP_NUM_THREADS=2 .venv/bin/grm demo

test: .venv/dev.done .venv-ppo/dev.done lint
	GRM_OLDEST_PYTHON=$(CURDIR)/.venv-ppo/bin/python .venv/bin/python -m pytest -n 2 --dist loadfile
	.venv-ppo/bin/python -m pytest -n 2 --dist loadfile -m trainer
	.venv-ppo/bin/python -m pytest -n 2 -m "not slow" tests/test_model.py tests/test_loading.py

lint: .venv/dev.done
	.venv/bin/ruff check .
	.venv/bin/mypy

# On a quiet machine: writes docs/benchmarks.md.
bench: .venv/dev.done
	.venv/bin/python benchmarks/training.py
	.venv/bin/python benchmarks/scoring.py

.venv/bin/python .venv-ppo/bin/python:
	$(PYTHON) -m venv $(@D)/..
	$@ -m pip install --quiet --upgrade pip

# torch first and by the constraints file: see there.
.venv/demo.done: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet -c constraints.txt torch
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

.venv/dev.done: .venv/demo.done
	.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.venv-ppo/dev.done: pyproject.toml constraints-ppo.txt | .venv-ppo/bin/python
	.venv-ppo/bin/python -m pip install --quiet -c constraints-ppo.txt torch
	.venv-ppo/bin/python -m pip install --quiet -c constraints-ppo.txt -e ".[ppo]" pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv .venv-ppo runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
