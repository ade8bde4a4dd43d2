"""Batch norm + residual + LIF in torch: the meaning that every kernel reproduces.

    m = batch_norm(y) + residual        spikes = lif(m viewed as [T, B, C, ...])

The neuron itself is the operator `lif`, whatever its backend.

Statistics run over all time steps of the batch. Where y is static (one frame for all T time steps), the operator
computes them once; mean and biased variance are the same, and the running variance is corrected to the T-fold sample
size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def batch_norm(y: torch.Tensor, bn: nn.Module, repeats: int = 1) -> torch.Tensor:
    """`bn(y)`, with running statistics as if every row of y occurred `repeats` times.

    Args:
        y: [N, C, ...].
        bn: A torch batch-norm module.
        repeats: How many time steps y stands for.
    """
    updates = bn.training and bn.track_running_stats
    if repeats == 1 or not updates:
        return bn(y)
    bn._check_input_dim(y)
    count = y.numel() // y.shape[1]
    if isinstance(bn, nn.SyncBatchNorm) or count == 1:
        # The sample size lies on other ranks too, or torch refuses it: let the module see every row.
        return bn(y.repeat(repeats, *[1] * (y.dim() - 1)))[: y.shape[0]]

    mean, variance = torch.zeros_like(bn.running_mean), torch.zeros_like(bn.running_var)
    out = F.batch_norm(y, mean, variance, bn.weight, bn.bias, training=True, momentum=1.0, eps=bn.eps)
    # torch's unbiased variance is var·n/(n-1) for n rows; the repeated sample has repeats·n.
    variance = variance * ((count - 1) / count * (repeats * count) / (repeats * count - 1))
    bn.num_batches_tracked.add_(1)
    momentum = 1.0 / bn.num_batches_tracked.to(mean.dtype) if bn.momentum is None else bn.momentum
    for running, observed in ((bn.running_mean, mean), (bn.running_var, variance)):
        running.mul_(1.0 - momentum).add_(observed * momentum)
    return out


def membrane_input(
    y: torch.Tensor,  # [T·B, C, ...], or [B, C, ...] where static
    bn: nn.Module,
    *,
    time_steps: int,
    residual: torch.Tensor | None,  # [T·B, C, ...], or [B, C, ...] for the same residual at each time step
    static: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return m as the neuron's input [T, B, C, ...], and as rows: [B, C, ...] where nothing in it varies in time."""
    m = batch_norm(y, bn, repeats=time_steps if static else 1)
    if residual is not None:
        if residual.shape[0] == m.shape[0]:
            m = m + residual
        else:  # one of the two is the same at each time step
            m = (_over_time(m, time_steps, static) + _over_time(residual, time_steps, not static)).flatten(0, 1)
            static = False
    return _over_time(m, time_steps, static), m


def _over_time(rows: torch.Tensor, time_steps: int, static: bool) -> torch.Tensor:
    """[T·B, ...] -> [T, B, ...]; a static [B, ...] is expanded with stride 0."""
    return rows.expand(time_steps, *rows.shape) if static else rows.unflatten(0, (time_steps, -1))
