"""Every backend of the loss, the reference among them, against formulas in NumPy that know nothing of it."""

import os

import pytest

import oracle_seal_loss_cases as cases
from oracle_cases import BF16, F16, F32, each_instruction_set, sweep
from seal_fast.backends import available
from seal_fast.kernels.seal_loss import MOST_STEPS

__all__ = ["each_instruction_set"]

LIMIT = 4.0  # roundoffs of any number; measured 2.4 at most, of the confidence where all classes are alike, else 1.3
FEW = {"triton": 6, "cupy": 6}  # cases in short, where a kernel is compiled or interpreted for each; 60 for others
MANY = {"triton": 100, "cupy": 100, "torch": 500}  # 2000 for others


# Tensors are on the CPU, where a GPU's kernels run in the interpreter alone.
BACKENDS = [name for name in available("seal_loss") if name in ("cpu", "torch") or os.environ.get("TRITON_INTERPRET")]


def check(seeds: range, backend: str) -> None:
    sizes = {}
    if backend in FEW:
        sizes = {"steps": [1, 2, 4, 17], "classes": [2, 7, 16, 100], "dtypes": (F32, F32, F16, BF16)}
        assert max(sizes["steps"]) <= MOST_STEPS
    if backend == "torch":
        sizes = {"largest": 1e15}  # the norm of larger logits is infinite to torch in float32
    sweep(lambda seed: cases.check(cases.case_of(seed, **sizes), backend, LIMIT), seeds)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_gradients_and_weights(backend):
    check(range(FEW.get(backend, 60)), backend)


def test_every_instruction_set(each_instruction_set):
    check(range(100, 160), "cpu")


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_cases(backend):
    check(range(1000, 1000 + MANY.get(backend, 2000)), backend)


@pytest.mark.long
def test_every_instruction_set_in_many_cases(each_instruction_set):
    check(range(10_000, 10_700), "cpu")
