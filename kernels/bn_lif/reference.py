"""Batch norm + residual + LIF in torch: the meaning that every kernel reproduces.

    m = batch_norm(y) + residual, or + batch_norm(residual)        spikes = lif(m viewed as [T, B, C, ...])

The neuron itself is the operator `lif`, whatever its backend.

Statistics run over all time steps of the batch. Where y is static (one frame for all T time steps), the operator
computes them once; mean and biased variance are the same, and the running variance is corrected to the T-fold sample
size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import ranks


def has_step_modes(bn: nn.Module) -> bool:
    """Whether `bn` is SpikingJelly's batch norm, which is torch's on the rows of [T, B, C, ...] in step mode "m"."""
    kind = type(bn)
    return kind.__name__ in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d") and kind.__module__.startswith(
        "spikingjelly."
    )


def _rows(y: torch.Tensor, bn: nn.Module) -> torch.Tensor:
    return nn.modules.batchnorm._BatchNorm.forward(bn, y) if has_step_modes(bn) else bn(y)


def batch_norm(y: torch.Tensor, bn: nn.Module, repeats: int = 1) -> torch.Tensor:
    """`bn(y)`, with running statistics as if every row of y occurred `repeats` times.

    Args:
        y: [N, C, ...].
        bn: A torch batch-norm module, or SpikingJelly's, whose step mode does not matter.
        repeats: How many time steps y stands for.
    """
    updates = bn.training and bn.track_running_stats and bn.running_mean is not None
    group = ranks.synchronised(bn)
    if group is not None:  # torch's own does not run on the CPU
        out, mean, variance, count = ranks.batch_norm(y, bn, group)
        if updates:
            update_running_statistics(bn, mean, variance, repeats * count)
        return out
    count = y.numel() // y.shape[1]
    if repeats > 1 and count == 1 and (bn.training or bn.running_mean is None):  # torch refuses it: it sees every row
        return _rows(y.repeat(repeats, *[1] * (y.dim() - 1)), bn)[: y.shape[0]]
    if repeats == 1 or not updates:
        return _rows(y, bn)
    bn._check_input_dim(y)

    mean, variance = torch.zeros_like(bn.running_mean), torch.zeros_like(bn.running_var)
    out = F.batch_norm(y, mean, variance, bn.weight, bn.bias, training=True, momentum=1.0, eps=bn.eps)
    variance = variance * ((count - 1) / count)  # torch's is unbiased
    update_running_statistics(bn, mean, variance, repeats * count)
    return out


@torch.no_grad()
def update_running_statistics(
    bn: nn.Module,
    mean: torch.Tensor,  # [C]
    variance: torch.Tensor,  # [C], biased
    count: int | torch.Tensor,  # numbers that they are of
) -> None:
    """Let the running statistics see one more batch, as torch does."""
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    momentum = bn.momentum
    if momentum is None:
        momentum = 0.0 if bn.num_batches_tracked is None else 1.0 / bn.num_batches_tracked.to(mean.dtype)
    for running, batch in ((bn.running_mean, mean), (bn.running_var, variance * (count / (count - 1)))):
        if running.dtype == batch.dtype:
            running.lerp_(batch, momentum)
        else:  # in 16 bits it is rounded once
            running.copy_(running.to(batch.dtype).lerp(batch, momentum))


def membrane_input(
    y: torch.Tensor,  # [T·B, C, ...], or [B, C, ...] where static
    bn: nn.Module,
    *,
    time_steps: int,
    residual: torch.Tensor | None,  # [T·B, C, ...], or [B, C, ...] for the same residual at each time step
    residual_bn: nn.Module | None,  # a batch norm that the residual passes first
    static: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return m as the neuron's input [T, B, C, ...], and as rows: [B, C, ...] where nothing in it varies in time."""
    m = batch_norm(y, bn, repeats=time_steps if static else 1)
    if residual is not None:
        if residual_bn is not None:
            batch = m.shape[0] if static else m.shape[0] // time_steps
            residual = batch_norm(residual, residual_bn, repeats=1 if residual.shape[0] > batch else time_steps)
        if residual.shape[0] == m.shape[0]:
            m = m + residual
        else:  # one of the two is the same at each time step
            m = (_over_time(m, time_steps, static) + _over_time(residual, time_steps, not static)).flatten(0, 1)
            static = False
    return _over_time(m, time_steps, static), m


def _over_time(rows: torch.Tensor, time_steps: int, static: bool) -> torch.Tensor:
    """[T·B, ...] -> [T, B, ...]; a static [B, ...] is expanded with stride 0."""
    return rows.expand(time_steps, *rows.shape) if static else rows.unflatten(0, (time_steps, -1))
