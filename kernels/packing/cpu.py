"""Packed spikes back to numbers by native code."""

from __future__ import annotations

import ctypes

import torch

from ..launch.cpu import DTYPES, run


class _Arguments(ctypes.Structure):
    """As UnpackArguments in cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "spikes")),
        *((name, ctypes.c_int64) for name in ("T", "N")),
        *((name, ctypes.c_int32) for name in ("dtype", "threads")),
    )


def unpack(packed: torch.Tensor, N: int, dtype: torch.dtype) -> torch.Tensor:
    """Spikes [T, N] of `dtype` from their bits [T, ceil(N/8)]."""
    spikes = torch.empty(packed.shape[0], N, dtype=dtype)
    arguments = _Arguments(
        packed.data_ptr(), spikes.data_ptr(), packed.shape[0], N, DTYPES[dtype], torch.get_num_threads()
    )
    run("seal_unpack", arguments)
    return spikes
