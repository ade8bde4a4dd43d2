# make demo: train and distil on handwritten digits.   make test: run the tests.   make lint: style.
# Both make their own virtual environment in .venv first. PYTHON chooses the interpreter, 3.10 or newer.

PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard kernels/*/*.cpp kernels/*/*.h kernels/*/*.cuh)

.PHONY: demo test long lint clean

demo: .venv/.train
	@echo "==> A teacher and three spiking students on handwritten digits, on the GPU if there is one."
	$(BIN)/python -m seal_fast.train.demo

test: .venv/.test
	@echo "==> Tests; about eight minutes on two cores, no GPU needed."
	$(BIN)/python -m pytest

long: .venv/.test
	@echo "==> The longer sweeps."
	$(BIN)/python -m pytest -m long

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "seal-fast needs Python 3.10 or newer; name one with: make PYTHON=/path/to/python3"; exit 2; }
	@echo "==> Making a virtual environment in .venv"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "no virtual environment could be made; on Debian: apt install python3-venv"; exit 2; }

.venv/.train: .venv/bin/python setup.py pyproject.toml $(NATIVE)
	@echo "==> Installing seal-fast with what the trainers need (PyTorch is several GB the first time)"
	$(BIN)/pip install --disable-pip-version-check -q -e '.[train]'
	@touch $@

.venv/.test: .venv/bin/python setup.py pyproject.toml $(NATIVE)
	@echo "==> Installing seal-fast with what the tests need (PyTorch is several GB the first time)"
	$(BIN)/pip install --disable-pip-version-check -q -e '.[test]'
	@touch $@ .venv/.train

clean:
	rm -rf .venv build *.egg-info kernels/*.so
