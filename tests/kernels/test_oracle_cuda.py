"""The CUDA kernels against formulas in NumPy, run by their CuPy launchers on the CPU."""

import sys
from collections import Counter

import pytest

import cuda_host
import oracle_bn_lif_cases
import oracle_lif
import oracle_seal_loss_cases
from oracle_cases import BF16, F16, F32, sweep
from seal_fast.kernels.bn_lif import cupy as of_bn_lif
from seal_fast.kernels.lif import cupy as of_lif
from seal_fast.kernels.seal_loss import cupy as of_seal_loss

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

LIMIT = 4.0  # roundoffs; see the tests of the other backends
SHAPES = [shape for shape in oracle_bn_lif_cases.SHAPES if shape[1] < 500]
COUNTS = Counter()
OPERATORS = {  # the launcher, its cases, their sizes, and what else a check takes
    "lif": (
        of_lif,
        oracle_lif,
        {"steps": [1, 2, 4, 17], "neurons": [(0,), (1,), (7,), (2, 3), (2, 7, 3, 3), (1, 1, 513)]},
        (LIMIT,),
    ),
    "bn_lif": (of_bn_lif, oracle_bn_lif_cases, {"steps": [1, 2, 4], "shapes": SHAPES}, (LIMIT, 1.0, COUNTS)),
    "seal_loss": (
        of_seal_loss,
        oracle_seal_loss_cases,
        # The squares of larger logits are infinite to these kernels, and the weights NaN.
        {"steps": [1, 2, 4, 17], "classes": [2, 7, 16, 100], "dtypes": (F32, F32, F16, BF16), "largest": 1e15},
        (LIMIT,),
    ),
}


def check(operator: str, seeds: range, monkeypatch) -> None:
    room, cases, sizes, options = OPERATORS[operator]
    monkeypatch.setattr(sys.modules[f"seal_fast.ops.{operator}"], "resolve", lambda backend, *_: backend)
    cuda_host.install(monkeypatch, room)
    with cuda_host.planning():  # compiled at once
        for seed in seeds:
            cases.run(cases.case_of(seed, **sizes), "cupy")
    sweep(lambda seed: cases.check(cases.case_of(seed, **sizes), "cupy", *options), seeds)


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_equal_the_oracle(operator, monkeypatch):
    check(operator, range(5), monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_equal_the_oracle_in_more_cases(operator, monkeypatch):
    check(operator, range(100, 140), monkeypatch)
