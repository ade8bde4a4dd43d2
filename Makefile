# make demo: train and distil on handwritten digits.   make test: run the tests.   make bench: measure.   make lint: style.
# make test-oldest: the same tests with the oldest versions that are supported, in .venv-oldest.
# make test-middle: the same with versions in between, that users of a GPU have, in .venv-middle.
# make sanitize: tests of the native CPU kernels, built with GCC's AddressSanitizer and UndefinedBehaviorSanitizer.
# These make their own virtual environment first. PYTHON chooses the interpreter, 3.10 or newer.
# make gpu: all that needs a GPU, with the Python that is active; make gpu-kernels compiles its kernels beforehand.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?=
BIN := $(VENV)/bin
NATIVE := $(wildcard kernels/*/*.cpp kernels/*/*.h kernels/*/*.cuh)

.PHONY: demo test test-oldest test-middle long sanitize gpu gpu-kernels bench lint clean

demo: $(VENV)/.train
	@echo "==> A teacher and three spiking students on handwritten digits, on the GPU if there is one."
	$(BIN)/python -m seal_fast.train.demo

# A worker for each processor, and a thread for each worker: most tests use one. In the order of the folders, as the longest
# tests are in files of few, which would come last, alone.
test: $(VENV)/.test
	@echo "==> Tests; ten to fifteen minutes on two cores, no GPU needed."
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS="-c tests/oldest.txt"

test-middle:
	$(MAKE) test VENV=.venv-middle CONSTRAINTS="-c tests/middle.txt"

long: $(VENV)/.test
	@echo "==> The longer sweeps."
	$(BIN)/python -m pytest -m long

sanitize: $(VENV)/.test
	@echo "==> The native kernels under sanitizers, a copy for each instruction set; four minutes on two idle cores."
	$(BIN)/python tests/support/sanitize.py

# With the Python that is active: it has the torch that fits the GPU, and nothing is fetched. ARGUMENTS="--stages smoke"
# and the like: see benchmarks/gpu/__main__.py.
gpu:
	@echo "==> What a GPU is asked: errors, tests, times, training steps, compute-sanitizer; nine minutes."
	PYTHONPATH=benchmarks$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m gpu $(ARGUMENTS)

# Without a GPU, for one where time is short: with the versions of torch, Triton and CuPy that its machine has.
gpu-kernels:
	@echo "==> Compiling the kernels that make gpu starts, into build/gpu-kernels.tar.xz."
	PYTHONPATH=benchmarks $(PYTHON) -m gpu.prebuilt $(ARGUMENTS)

bench: $(VENV)/.test
	@echo "==> Tests of what is timed, then benchmarks; under ten minutes on two idle cores."
	$(BIN)/python benchmarks/cpu.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "seal-fast needs Python 3.10 or newer; name one with: make PYTHON=/path/to/python3"; exit 2; }
	@echo "==> Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no virtual environment could be made; on Debian: apt install python3-venv"; exit 2; }

$(VENV)/.train: $(VENV)/bin/python setup.py pyproject.toml $(NATIVE)
	@echo "==> Installing seal-fast with what the trainers need (PyTorch is several GB the first time)"
	$(BIN)/pip install --disable-pip-version-check -q -e '.[train]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python setup.py pyproject.toml $(NATIVE)
	@echo "==> Installing seal-fast with what the tests need (PyTorch is several GB the first time)"
	$(BIN)/pip install --disable-pip-version-check -q -e '.[test]' $(CONSTRAINTS)
	@touch $@ $(VENV)/.train

clean:
	rm -rf .venv .venv-oldest .venv-middle build *.egg-info kernels/*.so
