"""Spikes as bits, in Triton kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.triton import ACCESS, Launch, aligned, size

THREADS = 128  # of a program
WRITTEN = 8192  # bytes that a program of _unpack writes, in accesses of 16
SINGLY = 1024  # numbers that it writes where rows are not aligned; with more, threads spill registers


@triton.jit
def store_bits(packed, spike, mask):
    """Eight spikes to a byte; packed is [BLOCK / 8] pointers, spike and mask are [BLOCK]."""
    fired = tl.reshape((mask & (spike > 0)).to(tl.int32), [packed.shape[0], 8])
    inside = tl.reshape(mask.to(tl.int32), [packed.shape[0], 8])
    byte = tl.sum(fired << tl.arange(0, 8)[None, :], 1)
    tl.store(packed, byte.to(tl.uint8), tl.max(inside, 1) > 0)


@triton.jit(do_not_specialize=["N"])  # see neuron/triton_steps.py
def _unpack(
    packed,  # [T, ceil(N / 8)] uint8
    spikes,  # [T, N]
    N,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    N = size(N, ALIGNED)
    blocks = tl.cdiv(N, BLOCK).to(tl.int32)  # of a row
    t = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    at = begin // 8 + tl.arange(0, BLOCK // 8)
    byte = tl.load(packed + t * tl.cdiv(N, 8) + at, at * 8 < N, other=0).to(tl.int32)
    fired = (byte[:, None] >> tl.arange(0, 8)[None, :]) & 1
    n = begin + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(spikes + t * N + n, tl.where(fired > 0, 1.0, 0.0).to(spikes.dtype.element_ty), n < N)


def unpack(packed: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """Spikes [T, N] of `dtype` from their bits [T, ceil(N/8)]."""
    T = packed.shape[0]
    spikes = torch.empty(T, N, dtype=dtype, device=packed.device)
    if spikes.numel() == 0:
        return spikes
    wide = aligned(dtype, N)
    block = WRITTEN // dtype.itemsize if wide else SINGLY
    launch = Launch(
        _unpack,
        T * -(-N // block),
        (N,),
        device=packed.device,
        num_warps=THREADS // 32,
        ALIGNED=ACCESS // dtype.itemsize if wide else 1,
        BLOCK=block,
    )
    launch(packed.contiguous(), spikes)
    return spikes
