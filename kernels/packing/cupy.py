"""Packed spikes back to numbers by a CUDA C++ kernel."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..launch.cupy import ACCESS, NUMBERS, Launch, reach, specialised

SOURCE = Path(__file__).with_name("cuda.cu")
THREADS = 128  # of a block, as in cuda.cu
ACCESSES = 4  # of a thread, as in cuda.cu


def unpack(packed: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """Spikes [T, N] of `dtype` from their bits [T, ceil(N/8)]."""
    T = packed.shape[0]
    spikes = torch.empty(T, N, dtype=dtype, device=packed.device)
    if spikes.numel() == 0:
        return spikes
    neighbours = ACCESS // dtype.itemsize
    if N % neighbours or neighbours > reach((spikes,)):
        neighbours = 1
    launch = Launch(
        SOURCE,
        specialised("unpack", NUMBERS[dtype], neighbours),
        T * -(-N // (ACCESSES * THREADS * neighbours)),
        THREADS,
        (N,),
        real=torch.float32,  # there are none
        device=packed.device,
    )
    launch(packed.contiguous(), spikes)
    return spikes
