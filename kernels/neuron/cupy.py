"""What launchers of CUDA kernels pass of a neuron."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..launch.cupy import enumerator
from .options import Options

NEURON = Path(__file__).with_name("neuron.cuh")
SURROGATE = Path(__file__).resolve().parents[1] / "surrogate" / "surrogate.cuh"


class Passed(NamedTuple):
    """The neuron's options as a kernel takes them, beside the constants in memory."""

    channels: int  # of the constants
    charging: tuple[str, bool, bool]  # template: CHARGE, SOFT, PER_CHANNEL
    slopes: tuple[bool, str]  # template of backward: DETACH, SURROGATE
    numbers: tuple[float, ...]  # τ, 1/τ, 1 - 1/τ, θ and v_reset
    alpha: float  # of the surrogate; backward takes it after the numbers


def passed(options: Options, constants: Tensor | None) -> Passed:
    """Of the options, whose constants [4, channels] are in memory where one of them is a tensor."""
    channels = 1 if constants is None else constants.shape[1]
    return Passed(
        channels,
        (enumerator(NEURON, "ChargeKind", options.charge_kind), options.v_reset is None, channels > 1),
        (options.detach_reset, enumerator(SURROGATE, "SurrogateKind", options.surrogate.name)),
        tuple(float(value) for value in (*options.by_value, options.v_reset or 0.0)),
        float(options.surrogate.alpha),
    )
