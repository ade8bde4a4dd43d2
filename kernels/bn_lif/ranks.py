"""Batch norm over several processes: statistics and their gradients as of all ranks' numbers together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def synchronised(bn: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that share the statistics of a SyncBatchNorm in training, where there are several."""
    if not (isinstance(bn, nn.SyncBatchNorm) and bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def summed(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of all ranks' `sums`, in other memory."""
    if group is None:
        return sums
    total = sums.clone()
    dist.all_reduce(total, group=group)
    return total


def merged(mean: Tensor, variance: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of all ranks' numbers together, merged in float64 and in the order of ranks."""
    own = torch.cat((mean.double(), variance.double(), mean.new_full((1,), count, dtype=torch.float64)))
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    rows = torch.stack(every)
    counts, means, variances = rows[:, -1:], *rows[:, :-1].chunk(2, 1)
    total = counts.sum()
    merged = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - merged) ** 2)).sum(0) / total
    return merged.to(mean.dtype), spread.to(mean.dtype), total.to(mean.dtype)


class SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, own: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: D102
        ctx.group = group
        return summed(own, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: D102
        return summed(grad.contiguous(), ctx.group), None


def batch_norm(y: Tensor, bn: nn.SyncBatchNorm, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training batch norm of y [N, C, ...] by autograd; and mean, biased variance and count of all numbers."""
    axes = [0, *range(2, y.dim())]
    shape = [1, -1, *[1] * (y.dim() - 2)]
    rows = y if y.dtype.itemsize > 2 else y.float()
    count = SumOverRanks.apply(rows.new_full((), y.numel() // y.shape[1]), group)
    mean = SumOverRanks.apply(rows.sum(axes), group) / count
    centred = rows - mean.reshape(shape)
    variance = SumOverRanks.apply((centred * centred).sum(axes), group) / count
    out = centred * torch.rsqrt(variance + bn.eps).reshape(shape)
    if bn.affine:
        out = out * bn.weight.reshape(shape) + bn.bias.reshape(shape)
    return out.to(y.dtype), mean.detach(), variance.detach(), count
