"""Packed spikes back to numbers by native code."""

from __future__ import annotations

import torch

from ..launch.cpu import DTYPES, run, structure

_Arguments = structure("UnpackArguments")


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
