"""The neuron's description as native code takes it."""

from __future__ import annotations

import ctypes

import torch

from ..surrogate.reference import SURROGATES
from .options import Options


class Neuron(ctypes.Structure):
    """As NeuronArguments in blocks.h."""

    _fields_ = (
        ("constants", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("channels", "channel_stride")),
        *((name, ctypes.c_double) for name in ("reset", "alpha")),
        *((name, ctypes.c_int32) for name in ("charge", "soft", "detach", "decay_input", "surrogate")),
    )


def describe(options: Options, dtype: torch.dtype, row: torch.Tensor) -> tuple[Neuron, torch.Tensor]:
    """The neurons of `row` [B, C, ...] with a state of `dtype`, and the tensor that must outlive them."""
    constants = options.constants(row.device, dtype)
    channels = constants.shape[1]
    neuron = Neuron(
        constants=constants.data_ptr(),
        channels=channels,
        channel_stride=row.stride(1) if channels > 1 else 1,
        reset=options.v_reset or 0.0,
        alpha=options.surrogate.alpha,
        charge=options.charge_kind,
        soft=options.v_reset is None,
        detach=options.detach_reset,
        decay_input=options.decay_input,
        surrogate=list(SURROGATES).index(options.surrogate.name),
    )
    return neuron, constants
