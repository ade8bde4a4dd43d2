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
FLOAT32, BFLOAT16, SLOW_BFLOAT16 = Turn(0.75, 0.9), Turn(0.32, 0.45), Turn(1.0, 1.0)
# Dense multiplications below which the host's time decides: 4 million take a core 0.05 ms.
LEAST = 1 << 22
# Output pixels whose dense convolution takes as long as the kernels take to rearrange the weights, a nanosecond each.
REARRANGED = 128
# Output channels that the kernels take at a time; a remainder takes as long.
COLUMNS = 64


@functools.cache
def turn(dtype: torch.dtype) -> Turn:
    """Where it turns on this processor, for float32 or bfloat16."""
    if dtype is torch.float32:
        return FLOAT32
    if _supports("_is_amx_tile_supported"):  # not measured: tiles multiply several times faster than vectors
        return Turn(0.0, 0.0)
    return BFLOAT16 if _supports("_is_avx512_bf16_supported") else SLOW_BFLOAT16


def limit(
    dtype: torch.dtype, pixels: int, weight: tuple[int, int, int, int], stride: tuple[int, int], *, of_weight: bool
) -> float:
    """The firing rate up to which zeros are to be skipped.

    Args:
        dtype: float32 or bfloat16.
        pixels: Of the output, all frames together.
        weight: O, C, KH, KW.
        stride: Of both axes.
        of_weight: Whether it is the gradient of the weights.
    """
    outputs, channels, height, width = weight
    too_far = stride[0] > 2 * height or stride[1] > 2 * width  # most of the input meets no output, and is listed
    if pixels * outputs * channels * height * width < LEAST or pixels <= REARRANGED or too_far:
        return 0.0
    whole = turn(dtype).weight_gradient if of_weight else turn(dtype).forward
    share = outputs / (-(-outputs // COLUMNS) * COLUMNS)
    if dtype is torch.bfloat16 and not of_weight:
        share = 2 * share - 1  # lists of spikes take as long for 32 output channels, which were slower at any rate
    return max(0.0, whole * (1 - REARRANGED / pixels) * share)


def _supports(check: str) -> bool:
    return bool(getattr(torch.cpu, check, bool)())
