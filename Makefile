# `make quickstart` and `make test` do everything on a bare machine with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The launcher and the ranks it starts find the environment's programs by name.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Only a shell other than make's default one is sure to look commands up in the PATH exported above.
SHELL := /bin/bash

.PHONY: install test quickstart clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "error: no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; \
	  exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, $(PYTHON) is Python %d.%d; name another one: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@echo "Installing into $(VENV): a few minutes the first time"
	@# torch first: whatever looks for a torch while it is installed finds the pinned one.
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) --editable '.[quickstart,dev]'
	@touch $@

# One thread per process: distributed tests start several on few cores.
test: export OMP_NUM_THREADS = 1
test: install
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo
	pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder

quickstart: install
	python launch/prepare_smollm2.py
	deepspeed launch/train.py --config configs/quickstart.json
	deepspeed launch/evaluate.py --config configs/quickstart.json --adapter runs/quickstart/adapter --no-base
	python launch/generate.py --adapter runs/quickstart/adapter --task niah_multikey_2 --length 1024

# Leaves runs/ and models/ alone: they are results and downloads.
clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
