"""Spikes as bits in torch: the meaning of packed spikes.

Spikes [T, ...] are T rows of N numbers in the order in which each x[t] lies in memory. Row t of the packed spikes
[T, ceil(N/8)] holds spike 8j + i in bit i of byte j; bits beyond N are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..launch.layout import memory_order


def bytes_of(spikes: torch.Tensor) -> tuple[int, int]:
    """Shape of the packed spikes."""
    return spikes.shape[0], (spikes[0].numel() + 7) // 8


def pack(spikes: torch.Tensor) -> torch.Tensor:  # [T, ...], 0 or 1 -> [T, ceil(N/8)] uint8
    """Eight spikes to a byte."""
    rows = memory_order(spikes).flatten(1) if spikes.dim() > 1 else spikes.unsqueeze(1)
    bits = F.pad(rows, (0, -rows.shape[1] % 8)).unflatten(1, (-1, 8)) != 0
    return (bits.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=spikes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, N: int, dtype: torch.dtype) -> torch.Tensor:  # [T, ceil(N/8)] uint8 -> [T, N]
    """The spikes as numbers again, rows in the order in which they lay in memory."""
    bits = torch.stack([packed >> bit for bit in range(8)], -1) & 1  # no other tensor: fake ones would not meet it
    return bits.flatten(1)[:, :N].to(dtype)


def count(packed: torch.Tensor) -> int:
    """How many bits of the bytes are set."""
    return int(unpack(packed.reshape(1, -1), 8 * packed.numel(), torch.uint8).sum(dtype=torch.int64))
