# make demo: train and distil on handwritten digits.   make test: run the tests.   make bench: measure.   make lint: style.
# These make their own virtual environment in .venv first. PYTHON chooses the interpreter, 3.10 or newer.
# make gpu: all that needs a GPU, with the Python that is active.

PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(wildcard kernels/*/*.cpp kernels/*/*.h kernels/*/*.cuh)

.PHONY: demo test long gpu bench lint clean

demo: .venv/.train
	@echo "==> A teacher and three spiking students on handwritten digits, on the GPU if there is one."
	$(BIN)/python -m seal_fast.train.demo

test: .venv/.test
	@echo "==> Tests; about eleven minutes on two cores, no GPU needed."
	$(BIN)/python -m pytest

long: .venv/.test
	@echo "==> The longer sweeps."
	$(BIN)/python -m pytest -m long

# With the Python that is active: it has the torch that fits the GPU, and nothing is fetched.
gpu:
	@echo "==> Tests, compute-sanitizer and benchmarks on the GPU, in less than ten minutes."
	$(PYTHON) benchmarks/gpu.py

bench: .venv/.test
	@echo "==> Tests of what is timed, then benchmarks; under ten minutes on two idle cores."
	$(BIN)/python benchmarks/cpu.py

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
