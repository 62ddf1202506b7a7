# Two commands: `make demo` and `make test`. Each does its own set-up in .venv and re-does nothing that is up to date.

SHELL := /bin/bash
BASE_PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
export NO_ALBUMENTATIONS_UPDATE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test test-full lint gpu

setup: $(VENV)/.installed $(VENV)/.models

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "Python 3.12 or newer is needed: set BASE_PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.models: $(VENV)/.installed embeddings/weights.py
	$(PYTHON) -m embeddings.weights
	@touch $@

demo: setup
	$(PYTHON) -m demo

# In two processes, each file's tests in one of them.
test: setup
	$(PYTHON) -m pytest -m "not long" --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Everything, the long families included; writes benchmarks/results/test-full.json.
test-full: setup
	$(PYTHON) -m benchmarks.test_full

lint: $(VENV)/.installed
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports

# On a machine with a GPU; needs torch and numpy only, neither ray nor faiss nor .venv.
gpu:
	$(or $(GPU_PYTHON),python3) -m benchmarks.gpu
