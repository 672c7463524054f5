# Everything runs in .venv, which the targets make themselves from $(PYTHON), 3.11 or newer.
PYTHON ?= python3
MODEL ?= an4

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
INSTALLED_NOTEBOOKS := $(VENV)/.installed-notebooks
INSTALLED_SIM := $(VENV)/.installed-sim
INSTALLED_CUDA := $(VENV)/.installed-cuda

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two pips must not fill one environment
.PHONY: help demo test test-sim test-ptx test-driver test-run test-gpu check parity bench bench-gpu notebooks notebooks-write clean

help:
	@echo "make demo               transcribe the bundled clip"
	@echo "make test               run the tests"
	@echo "make test-sim           run every CUDA kernel and a whole small model in Numba's simulator; needs no GPU"
	@echo "make test-ptx           compile every CUDA kernel for three generations of GPUs; needs no GPU"
	@echo "make test-driver        run the CUDA backend on a driver that runs no kernel; needs no GPU, but a C compiler"
	@echo "make test-run           run the CUDA kernels as compiled, turned into C; needs no GPU, but a C compiler"
	@echo "make test-gpu           compare the CUDA backend with the CPU and PyTorch on a GPU"
	@echo "make check              ruff (lint and format) and mypy"
	@echo "make parity MODEL=an4   compare a checkpoint with transformers, point by point"
	@echo "make bench              time the Numba backend beside transformers and ONNX Runtime (15 minutes); draws time-against-length.png"
	@echo "make bench-gpu          time the CUDA backend beside transformers on a GPU"
	@echo "make notebooks          run every notebook from a clean kernel; make notebooks-write keeps what they show"
	@echo "make clean              remove .venv and everything built"
	@echo
	@echo "PYTHON=python3.12 make test   chooses the interpreter of a new .venv (make clean removes the old one)"

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

$(INSTALLED_NOTEBOOKS): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[notebooks]'
	@touch $@ $(INSTALLED)

$(INSTALLED_SIM): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,simulator]'
	@touch $@ $(INSTALLED) $(INSTALLED_TEST)

$(INSTALLED_CUDA): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,cuda]'
	@touch $@ $(INSTALLED) $(INSTALLED_TEST)

# On the backend that has nothing to compile first.
demo: $(INSTALLED)
	$(BIN)/sewd-np transcribe --backend numpy

# Two workers with one BLAS thread each: on two cores more of either only wait for one another.
test: $(INSTALLED_TEST)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

# The simulator is chosen when Numba is first imported, so each of these is a process of its own.
test-sim: $(INSTALLED_SIM)
	NUMBA_ENABLE_CUDASIM=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/cuda/test_sim_*.py

test-ptx: $(INSTALLED_CUDA)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/cuda/test_ptx_*.py

# What is around the kernels: copies, memory, graphs, threads, what kernels are given.
test-driver: $(INSTALLED_CUDA)
	PRETENDED_DRIVER=1 $(BIN)/python -m pytest -q tests/cuda/test_driver_*.py

# The kernels' PTX, turned into C and run; with them the attention tests meant for a GPU, those that are short.
test-run: $(INSTALLED_CUDA)
	PRETENDED_DRIVER=runs OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/cuda/test_run_*.py
	PRETENDED_DRIVER=runs OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m gpu -k 250 tests/cuda/test_gpu_attention.py

test-gpu: $(INSTALLED_CUDA)
	$(BIN)/sewd-np info an4 --backend cuda
	$(BIN)/python -m pytest -q -m gpu tests/cuda/test_gpu_*.py

check: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(INSTALLED_TEST)
	$(BIN)/python -m tests.parity $(MODEL)

bench: $(INSTALLED_TEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m benchmarks.cpu

bench-gpu: $(INSTALLED_CUDA)
	$(BIN)/sewd-np info an4 --backend cuda
	$(BIN)/python -m benchmarks.gpu

notebooks: $(INSTALLED_NOTEBOOKS)
	$(BIN)/python notebooks/run.py

notebooks-write: $(INSTALLED_NOTEBOOKS)
	$(BIN)/python notebooks/run.py --write

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
