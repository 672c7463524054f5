# Everything runs in .venv, which the targets make themselves from $(PYTHON), 3.11 or newer.
PYTHON ?= python3
MODEL ?= an4

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test

.DEFAULT_GOAL := help
.PHONY: help demo test check parity bench clean

help:
	@echo "make demo               transcribe the bundled clip"
	@echo "make test               run the tests"
	@echo "make check              ruff (lint and format) and mypy"
	@echo "make parity MODEL=an4   compare a checkpoint with transformers, point by point"
	@echo "make bench              time the Numba backend beside transformers and ONNX Runtime (15 minutes)"
	@echo "make clean              remove .venv and everything built"
	@echo
	@echo "PYTHON=python3.12 make test   chooses the interpreter"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Stamps: installed again only when the list of dependencies may have changed.
$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(INSTALLED_TEST): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/sewd-np transcribe

# Two workers with one BLAS thread each: on two cores more of either only wait for one another. Numba keeps a compiled
# kernel until that kernel's own file changes, even if a kernel it calls has changed: so a cache for each set of files.
test: $(INSTALLED_TEST)
	NUMBA_CACHE_DIR=$(CURDIR)/.numba/$$(cat sewd_np/cpu_*.py | cksum | cut -d ' ' -f 1) \
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

check: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(INSTALLED_TEST)
	$(BIN)/python -m tests.parity $(MODEL)

bench: $(INSTALLED_TEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m benchmarks.cpu

clean:
	rm -rf $(VENV) .numba build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
