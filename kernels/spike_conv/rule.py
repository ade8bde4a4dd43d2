"""Where a convolution that skips zeros is faster than torch's dense one, by what was measured (docs/cost.md)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Turn(NamedTuple):
    """The firing rate from which the dense convolution is faster; above 1 it never is."""

    forward: float
    weight_gradient: float


# On two cores of an AMD EPYC with AVX-512: of ResNet-18's layers the one where it turns first. In bfloat16 the dense
# kernel takes half of float32's time where the processor multiplies bfloat16; else torch's takes several times as long.
FLOAT32, BFLOAT16, SLOW_BFLOAT16 = Turn(0.75, 0.9), Turn(0.35, 0.45), Turn(1.0, 1.0)
# Dense multiplications below which the host's time decides: 4 million take a core 0.05 ms.
LEAST = 1 << 22


@functools.cache
def turn(dtype: torch.dtype) -> Turn:
    """Where it turns on this processor, for float32 or bfloat16."""
    if dtype is torch.float32:
        return FLOAT32
    if _supports("_is_amx_tile_supported"):  # not measured: tiles multiply several times faster than vectors
        return Turn(0.0, 0.0)
    return BFLOAT16 if _supports("_is_avx512_bf16_supported") else SLOW_BFLOAT16


def _supports(check: str) -> bool:
    return bool(getattr(torch.cpu, check, bool)())
