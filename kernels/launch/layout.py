"""Memory layouts: [T, ...] tensors as T rows of N numbers that lie densely in memory, whatever their shape."""

from __future__ import annotations

import torch


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements fill one block of memory, in any order of its axes."""
    if tensor.is_contiguous():
        return True
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


def like_row(tensor: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """`tensor` [...] itself if it lies in memory as `row` [...] does, else a copy that does."""
    if _alike(tensor, row):
        return tensor
    return torch.empty_strided(row.shape, row.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def like_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`tensor` [T, ...] itself if each step lies as the steps of `rows` do, at any stride along T, else a copy."""
    return tensor if _alike(tensor[0], rows[0]) else empty_rows(rows).copy_(tensor)


def memory_order(rows: torch.Tensor) -> torch.Tensor:
    """[T, ...] with the axes after T permuted to the order in which they lie in memory."""
    return rows.permute(0, *sorted(range(1, rows.dim()), key=lambda axis: -rows.stride(axis)))


def _alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    strides = zip(right.shape, left.stride(), right.stride(), strict=True)
    return all(size == 1 or stride == other for size, stride, other in strides)
