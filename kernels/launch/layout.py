"""Memory layouts: [T, ...] tensors as T rows of N numbers that lie densely in memory, whatever their shape."""

from __future__ import annotations

import torch


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one block of memory, in any order of its axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if each x[t] is dense and all lie alike, which every layout of [T, ...] data does; else a copy."""
    return x if is_dense(x[0]) else x.contiguous()


def empty_rows(x: torch.Tensor) -> torch.Tensor:
    """An empty tensor of x's shape and dtype whose rows lie one after the other, each in the layout of x[0]."""
    strides = (x[0].numel(), *x.stride()[1:])
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def like_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`tensor` itself if it lies in memory as `rows` does, else a copy that does."""
    same = all(
        size == 1 or left == right for size, left, right in zip(rows.shape, tensor.stride(), rows.stride(), strict=True)
    )
    return (
        tensor
        if same
        else torch.empty_strided(rows.shape, rows.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    )
