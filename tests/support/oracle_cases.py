"""What the tests against the oracle share: inputs that hurt, sweeps over seeds, and how far results are off."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from oracle import Gradient
from seal_fast.kernels.launch import cpu

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
HALF_UNIT = {F32: 2.0**-24, F64: 0.0, F16: 2.0**-11, BF16: 2.0**-8}  # of a number's last place, relative to it
LEAST = {F32: 0.0, F64: 0.0, F16: 2.0**-25, BF16: 0.0}  # half a unit of the smallest numbers
EXTREME = (1e-30, -1e-30, 1e30, -1e30, 1e-40, 3e4, -3e4, 0.0, -0.0, 1.0)
INSTRUCTION_SETS = [
    name for name in cpu.ISA if cpu.library() is not None and getattr(cpu.library(), f"seal_cpu_runs_{name}", int)()
]


class Draw:
    """Choices of one seed."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)

    def of(self, values):
        """One of the values."""
        return values[self.random.integers(len(values))]

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def normal(self, shape, dtype, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.random.standard_normal(shape) * scale + offset)).to(dtype)

    def numbers(self, shape, dtype) -> torch.Tensor:
        """Input in one of the kinds that users or accidents give."""
        kind = self.of(["normal", "normal", "small", "large", "quarters", "extreme", "not finite"])
        values = self.normal(shape, F64, {"small": 0.05, "large": 30.0}.get(kind, 1.0), self.of([0.0, 0.5]))
        if kind == "quarters":  # potentials that equal the threshold
            values = (values * 4).round() / 4
        if kind in ("extreme", "not finite") and values.numel():
            numbers = EXTREME if kind == "extreme" else (math.inf, -math.inf, math.nan)
            chosen = torch.from_numpy(self.random.choice(numbers, values.shape))
            values = torch.where(torch.from_numpy(self.random.random(values.shape) < 0.1), chosen, values)
        return values.to(dtype)

    def laid_out(self, values: torch.Tensor, *, broadcast: bool = True) -> torch.Tensor:
        """The same shape in other memory; a broadcast one repeats its first step."""
        kinds = ["contiguous", "permuted", "sliced", "time last", "unaligned", "steps apart"]
        kind = self.of(kinds + ["broadcast"] * broadcast)
        if kind == "permuted":
            order = [int(axis) + 1 for axis in self.random.permutation(values.dim() - 1)]
            inverse = [0, *(order.index(axis) + 1 for axis in range(1, values.dim()))]
            return values.permute(0, *order).contiguous().permute(*inverse)
        if kind == "sliced":
            return torch.stack([values, values + 1], -1)[..., 0]
        if kind == "time last":
            return values.movedim(0, -1).contiguous().movedim(-1, 0)
        if kind == "unaligned":
            return torch.cat([values.new_zeros(1), values.flatten()])[1:].view_as(values)
        if kind == "steps apart":
            return values.repeat_interleave(2, 0)[::2]
        if kind == "broadcast":
            return values[:1].expand_as(values)
        return values


def array(tensor: torch.Tensor, dtype: torch.dtype = F64) -> np.ndarray:
    """Its numbers; float64 holds those of every dtype."""
    return tensor.detach().to(dtype).numpy()


def state_of(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def off(got: torch.Tensor, expected: Gradient, state: torch.dtype, roundings: int = 1) -> float:
    """How far `got` is off beyond so many roundings to its own dtype, relative to what roundoff explains.

    Numbers for which the oracle has no finite value or no bound are left out; what is too large for the dtype is Inf.
    """
    value, roundoff = expected
    assert tuple(got.shape) == value.shape
    if value.size == 0:
        return 0.0
    found = array(got)
    with np.errstate(all="ignore"):
        allowed = np.abs(value) * HALF_UNIT[got.dtype] * (roundings + 1e-4) + LEAST[got.dtype]
        error = np.maximum(np.abs(found - value) - allowed, 0.0)
        scale = torch.finfo(state).eps * roundoff + torch.finfo(state).tiny
        ratio = error / scale
        beyond = np.abs(value) + allowed + 8 * scale >= torch.finfo(got.dtype).max
    unknown = ~np.isfinite(value) | ~np.isfinite(roundoff)
    ratio = np.where(unknown | (beyond & np.isinf(found) & (np.sign(found) == np.sign(value))), 0.0, ratio)
    return math.inf if np.isnan(ratio).any() else float(ratio.max())


def sweep(check: Callable[[int], None], seeds: range) -> None:
    """Call `check` with each seed; of the cases in which it raises, the smallest is shown."""
    failures = []
    for seed in seeds:
        try:
            check(seed)
        except Exception as error:  # an operator that raises is wrong, too
            failures.append((getattr(error, "size", math.inf), seed, error))
    if failures:
        _, seed, error = min(failures, key=lambda failure: failure[:2])
        others = sorted({other for _, other, _ in failures})[:20]
        text = f"{len(failures)} of {len(seeds)} cases fail, seeds {others}; the smallest, {seed}: {error}"
        raise AssertionError(text) from error


class WrongError(AssertionError):
    """A case that fails, with its number of elements."""

    def __init__(self, message: str, size: int):
        super().__init__(message)
        self.size = size


def require(condition, message: str, case, size: int) -> None:
    if not condition:
        raise WrongError(f"{message} in {case}", size)


@pytest.fixture(params=INSTRUCTION_SETS)
def each_instruction_set(request, monkeypatch):
    """Let the CPU library run each instruction set that it has and this processor runs."""
    cpu.function.cache_clear()
    monkeypatch.setattr(cpu, "isa", lambda: request.param)
    yield request.param
    cpu.function.cache_clear()
