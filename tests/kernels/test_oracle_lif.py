"""Every backend of lif, the reference among them, against formulas in NumPy that know nothing of it."""

import pytest

import oracle_lif
from oracle_cases import each_instruction_set, sweep

__all__ = ["each_instruction_set"]

LIMIT = 2.5  # roundoffs of a gradient; measured 1.6 in float32, float64 and, besides their rounding, in 16 bits
FEW = {"triton": 6, "cupy": 6}  # cases in short, where a kernel is compiled or interpreted for each; 60 for others
MANY = {"triton": 300, "cupy": 300}  # 4000 for others


def check(seeds: range, backend: str) -> None:
    slow = backend in FEW
    sizes = {"steps": [1, 2, 4, 17], "neurons": [(0,), (1,), (7,), (2, 3), (2, 7, 3, 3), (1, 1, 513)]} if slow else {}
    sweep(lambda seed: oracle_lif.check(oracle_lif.case_of(seed, **sizes), backend, LIMIT), seeds)


def test_spikes_potentials_and_gradients(each_backend):
    check(range(FEW.get(each_backend, 60)), each_backend)


def test_every_instruction_set(each_instruction_set):
    check(range(100, 160), "cpu")


@pytest.mark.long
def test_many_cases(each_backend):
    check(range(1000, 1000 + MANY.get(each_backend, 4000)), each_backend)


@pytest.mark.long
def test_every_instruction_set_in_many_cases(each_instruction_set):
    check(range(10_000, 12_000), "cpu")
