"""Batch norms as kernels see them: one table [4k, C] of k norms, that of y and, if it has one, that of the residual.

Its rows are scale and shift of each norm in turn, then their means, then their inverse standard deviations 1/sqrt(var +
eps), all in the state's dtype: float32 for 16-bit y. A norm is y scale + shift, with scale = weight / sqrt(var + eps)
and shift = bias - mean scale.

The kernels that reduce y and its gradient also compute what follows from the sums. The functions here do the same in
torch, where the sums of several ranks are merged, or where a graph is traced.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """A batch norm. Tensors are [C] in the state's dtype."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None  # int64 scalar; None where running statistics are not updated
    momentum: float  # of the running statistics
    eps: float
    count: int  # elements per channel that mean and variance are taken of; 0 where they are the running statistics
    repeats: int  # time steps that each element stands for, as the running variance counts them

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of the module."""
        return self[:5]

    @property
    def numbers(self) -> tuple[float | int, ...]:
        """What follows them."""
        return self[5:]

    @property
    def correction(self) -> float:
        """Of the running variance, which is unbiased; 1 where it is not updated."""
        seen = self.count * self.repeats
        return seen / (seen - 1) if self.num_batches_tracked is not None else 1.0


def scales(table: Tensor) -> Tensor:
    """Scale and shift of each norm [2k, C]."""
    return table[: len(table) // 2]


def means(table: Tensor) -> Tensor:
    """Of each norm [k, C]."""
    return table[len(table) // 2 : 3 * len(table) // 4]


def inverse_stds(table: Tensor) -> Tensor:
    """Of each norm [k, C]."""
    return table[3 * len(table) // 4 :]


def table_of(rows: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]) -> Tensor:
    """The table of norms of which mean, inverse standard deviation, weight and bias are given."""
    scaled = []
    for mean, inverse_std, weight, bias in rows:
        scale = inverse_std if weight is None else inverse_std * weight
        scaled += [scale, -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)]
    means, inverse_stds, *_ = zip(*rows, strict=True)
    return torch.stack([*scaled, *means, *inverse_stds])


def coefficients_of(table: Tensor, sums: Tensor, counts: tuple[int | Tensor, ...]) -> Tensor:
    """[3k, C]: c0, c1 and c2 of the gradient c0 dm + c1 y + c2 that passes each norm.

    Args:
        table: Of the k norms.
        sums: [k + 1, C]; Σ dm, and Σ dm (y - mean) of what each norm was given, over all that its mean was taken of.
        counts: Elements per channel of each norm; 0 where its statistics are fixed, and c1 = c2 = 0.
    """
    rows = []
    for i, count in enumerate(counts):
        scale, mean, inverse_std = table[2 * i], means(table)[i], inverse_stds(table)[i]
        if isinstance(count, int) and count == 0:
            rows += [scale, torch.zeros_like(scale), torch.zeros_like(scale)]
        else:
            c1 = scale * inverse_std * (inverse_std * sums[1 + i]) / -count  # the cube of 1e-13 would be 0
            rows += [scale, c1, scale * sums[0] / -count - c1 * mean]
    return torch.stack(rows)
