"""What batch-norm modules are to the fused operator."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..kernels.bn_lif import norms, ranks
from ..kernels.bn_lif.norms import Norm
from ..kernels.bn_lif.reference import has_step_modes, update_running_statistics
from ..kernels.lif.reference import state_dtype
from ._dispatch import is_plain

_PLAIN = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def can_fuse(bn: nn.Module) -> bool:
    """Whether nothing but torch's own computation would run if the module were called, on statistics that are there."""
    tracks = bn.training and bn.track_running_stats
    whole = (bn.running_mean is None) == (bn.running_var is None) and not (tracks and bn.running_mean is None)
    return (type(bn).forward in _PLAIN or has_step_modes(bn)) and not has_hooks(bn) and whole


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module would run anything besides its forward and what autograd recorded of it."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def table_of(
    given: list[tuple[nn.Module, Tensor, int]],  # a norm, its input [N, C, ...], time steps that each row stands for
    group: ProcessGroup | None,  # ranks that share the statistics, where they are several
    kernel: ModuleType | None,  # that can be launched directly; else the call is traced
    statistics,  # the registered operator: [N, C, ...] -> mean and biased variance [C]
) -> tuple[Tensor, tuple[int | Tensor, ...]]:
    """The norms' table and counts, as in kernels/bn_lif/norms.py; updates their running statistics.

    Raises:
        ValueError: A norm in training has one element per channel, which has no variance.
    """
    found = [_norm_of(*each, group) for each in given]
    y = given[0][1]
    state, C = state_dtype(y.dtype), y.shape[1]
    if kernel is not None and group is None and all(_fits_kernels(norm, C, state, y.device) for norm in found):
        table = torch.empty(4 * len(given), C, dtype=state, device=y.device)
        for i, (norm, (_, y, _)) in enumerate(zip(found, given, strict=True)):
            kernel.fill_table(table, i, y.detach(), norm)
        return table, tuple(norm.count for norm in found)
    counts, rows = [], []
    with torch.no_grad():
        for norm, (bn, y, _) in zip(found, given, strict=True):
            count, mean, variance = norm.count, norm.running_mean, norm.running_var
            if count != 0:  # torch 2.6 takes a symbol for its present value where it is asked whether it is true
                mean, variance = (kernel.statistics if kernel else statistics)(y.detach())
                if group is not None:
                    mean, variance, count = ranks.merged(mean, variance, count, group)
                if norm.num_batches_tracked is not None:
                    update_running_statistics(bn, mean, variance, count * norm.repeats)
            inverse_std = torch.rsqrt(variance.to(state) + norm.eps)
            affine = [None if parameter is None else parameter.to(state) for parameter in (norm.weight, norm.bias)]
            rows.append((mean.to(state), inverse_std, *affine))
            counts.append(count)
        return norms.table_of(rows), tuple(counts)


def _norm_of(bn: nn.Module, y: Tensor, repeats: int, group: ProcessGroup | None) -> Norm:
    tensors = bn.weight, bn.bias, bn.running_mean, bn.running_var
    if not bn.training and bn.running_mean is not None:
        return Norm(*tensors, None, 0.0, bn.eps, 0, repeats)
    count = y.numel() // y.shape[1]
    if count * repeats == 1 and group is None:
        raise ValueError(f"y must have more than one number for each channel to train batch norm; got {list(y.shape)}.")
    tracked = None
    if bn.training and bn.track_running_stats:
        tracked = bn.num_batches_tracked
        if tracked is None:  # torch lets it be missing
            tracked = torch.zeros((), dtype=torch.int64, device=y.device)
    return Norm(*tensors, tracked, bn.momentum, bn.eps, count, repeats)


def _fits_kernels(norm: Norm, C: int, state: torch.dtype, device: torch.device) -> bool:
    """Whether kernels can take the norm's tensors where they lie, and its momentum, which is None for a mean of all.

    Kernels take addresses and check nothing: what does not fit goes to torch's operations, which raise if it is wrong.
    """

    def fits(tensor: Tensor | None, dtype: torch.dtype, size: int) -> bool:
        if tensor is None:
            return True
        found = tensor.dtype, tensor.device, tensor.numel()
        return is_plain(tensor) and found == (dtype, device, size) and tensor.is_contiguous()

    return (
        norm.momentum is not None
        and fits(norm.num_batches_tracked, torch.int64, 1)
        and all(fits(tensor, state, C) for tensor in norm[:4])
    )
