"""The neuron's description as native code takes it."""

from __future__ import annotations

import ctypes

import torch

from ..launch.cpu import code, structure
from .options import Options

_Arguments = structure("NeuronArguments")


def describe(
    options: Options, dtype: torch.dtype, device: torch.device, channel_stride: int
) -> tuple[ctypes.Structure, torch.Tensor]:
    """Neurons with a state of `dtype`, neighbouring channels so far apart; and the tensor that must outlive them."""
    constants = options.constants(device, dtype)
    channels = constants.shape[1]
    neuron = _Arguments(
        constants=constants.data_ptr(),
        channels=channels,
        channel_stride=channel_stride if channels > 1 else 1,
        reset=options.v_reset or 0.0,
        alpha=options.surrogate.alpha,
        charge=code("ChargeKind", options.charge_kind),
        soft=options.v_reset is None,
        detach=options.detach_reset,
        decay_input=options.decay_input,
        surrogate=code("SurrogateKind", options.surrogate.name),
    )
    return neuron, constants
