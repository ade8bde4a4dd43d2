"""What launchers of CUDA kernels pass of a neuron."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..surrogate.reference import SURROGATES
from .options import Options


class Passed(NamedTuple):
    """The neuron's options as a kernel takes them."""

    constants: Tensor | None  # [4, channels] where an option is a tensor
    channels: int
    charging: tuple[int, bool, bool]  # template: CHARGE, SOFT, PER_CHANNEL
    slopes: tuple[bool, int]  # template of backward: DETACH, SURROGATE
    numbers: tuple[float, ...]  # τ, 1/τ, 1 - 1/τ, θ and v_reset
    alpha: float  # of the surrogate; backward takes it after the numbers


def passed(options: Options, device: torch.device, state: torch.dtype) -> Passed:
    """For kernels whose state has the dtype `state`."""
    constants, values = options.passed(device, state)
    channels = 1 if constants is None else constants.shape[1]
    return Passed(
        constants,
        channels,
        (options.charge_kind, options.v_reset is None, channels > 1),
        (options.detach_reset, list(SURROGATES).index(options.surrogate.name)),
        tuple(float(value) for value in (*values, options.v_reset or 0.0)),
        float(options.surrogate.alpha),
    )
