# `make demo` sets everything up and trains; `make test` sets everything up and checks. Both can be run again at any time.
#
#   make demo                            environment, then three federated runs on the embedded model (CPU, a minute or two)
#   make test                            environment, then ruff, mypy and the tests, but for those of the next line and for GPUs
#   make test-deployment                 environment, then the tests that start deployments, kill processes, use a real model or train for minutes
#   .venv/bin/python -m pytest -m fuzz   many more hostile inputs than make test tries (docs/wire.md)
#   make clean                           remove the environment and the caches; runs/ stays
#
# On Linux, PyPI's torch brings CUDA (gigabytes). Without a GPU, the small build does:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# and for another torch (make clean first):  make demo TORCH="torch==2.12.*"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 $(PIP_FLAGS)

.PHONY: help demo test test-deployment check install clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.stamp-package
	@$(BIN)/fedtune demo

test: check
	@echo "== tests"
	@$(BIN)/python -m pytest -q -m "not gpu and not deployment and not faults and not long and not fuzz and not real" -n 2 --dist worksteal

test-deployment: $(VENV)/.stamp-dev
	@echo "== tests of deployments, of processes that die, of a real model, and long ones (nginx is needed: apt install nginx-light)"
	@$(BIN)/python -m pytest -q -m "(deployment or faults or long or real) and not gpu and not fuzz and not large"

check: $(VENV)/.stamp-dev
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "Run: $(BIN)/ruff format ." >&2; exit 1; }
	@echo "== mypy"
	@$(BIN)/mypy

install: $(VENV)/.stamp-package

$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "fedtune needs Python 3.11 or newer and '$(PYTHON)' is older or missing: make $(MAKECMDGOALS) PYTHON=python3.13" >&2; exit 1; }
	@echo "== environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "Python cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.stamp-torch: $(VENV)/.stamp-python
	@echo "== $(TORCH) (the largest download, minutes the first time)"
	@$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-torch pyproject.toml
	@echo "== fedtune and its libraries (a minute or two the first time)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-package
	@echo "== tools for tests"
	@$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
