"""Packed spikes back to numbers, and how many there are, by native code."""

from __future__ import annotations

import ctypes

import torch

from ..launch.cpu import DTYPES, run, structure

_Arguments, _CountArguments = structure("UnpackArguments"), structure("CountArguments")


def unpack(packed: torch.Tensor, N: int, dtype: torch.dtype) -> torch.Tensor:
    """Spikes [T, N] of `dtype` from their bits [T, ceil(N/8)]."""
    spikes = torch.empty(packed.shape[0], N, dtype=dtype, device=packed.device)
    arguments = _Arguments(
        packed=packed.data_ptr(),
        spikes=spikes.data_ptr(),
        T=packed.shape[0],
        N=N,
        dtype=DTYPES[dtype],
        threads=torch.get_num_threads(),
    )
    run("seal_unpack", arguments)
    return spikes


def count(packed: torch.Tensor) -> int:
    """How many bits are set in uint8 tensor, which is contiguous."""
    found = ctypes.c_int64()
    arguments = _CountArguments(
        packed=packed.data_ptr(),
        count=ctypes.addressof(found),
        bytes=packed.numel(),
        threads=torch.get_num_threads(),
    )
    run("seal_count", arguments)
    return found.value
