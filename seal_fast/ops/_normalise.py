"""What batch-norm modules are to the fused operator."""

from __future__ import annotations

from collections.abc import Callable

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


def tensors_of(bn: nn.Module) -> tuple[Tensor | None, ...]:
    """Those of `Norm`, where torch does not have to make one that is missing."""
    tracked = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    return bn.weight, bn.bias, bn.running_mean, bn.running_var, tracked


def key_of_norm(bn: nn.Module) -> tuple:
    """All that a plan depends on besides the module's tensors."""
    kind, forward, alone = type(bn), type(bn).forward, ranks.synchronised(bn) is None
    return (
        kind,
        forward,
        alone,
        has_hooks(bn),
        bn.training,
        bn.track_running_stats,
        bn.momentum,
        bn.eps,
        bn.num_features,
    )


def norm_of(bn: nn.Module, y: Tensor, repeats: int, group: ProcessGroup | None) -> Norm:
    """The module as kernels see it, for y [N, C, ...] whose rows stand for `repeats` time steps each.

    Raises:
        ValueError: A norm in training has one element per channel, which has no variance.
    """
    *tensors, tracked = tensors_of(bn)
    if not bn.training and bn.running_mean is not None:
        return Norm(*tensors, None, 0.0, bn.eps, 0, repeats)
    count = y.numel() // y.shape[1]
    if count * repeats == 1 and group is None:
        raise ValueError(f"y must have more than one number for each channel to train batch norm; got {list(y.shape)}.")
    if tracked is None and bn.training and bn.track_running_stats:  # torch lets it be missing
        tracked = torch.zeros((), dtype=torch.int64, device=y.device)
    return Norm(*tensors, tracked, bn.momentum, bn.eps, count, repeats)


def fits_kernels(bn: nn.Module, y: Tensor, norm: Norm) -> bool:
    """Whether kernels can take the norm's tensors where they lie, and its numbers: momentum is None for a mean of all.

    Kernels take addresses and check nothing: what does not fit goes to torch's operations, which raise if it is wrong.
    """
    state, C = state_dtype(y.dtype), y.shape[1]

    def fits(tensor: Tensor | None, dtype: torch.dtype, size: int) -> bool:
        if tensor is None:
            return True
        found = tensor.dtype, tensor.device, tensor.numel()
        return is_plain(tensor) and found == (dtype, y.device, size) and tensor.is_contiguous()

    return (
        type(norm.momentum) in (int, float)
        and type(norm.eps) in (int, float)
        and norm.num_batches_tracked is tensors_of(bn)[-1]
        and fits(norm.num_batches_tracked, torch.int64, 1)
        and all(fits(tensor, state, C) for tensor in norm[:4])
    )


def table_of(
    given: list[tuple[nn.Module, Tensor, Norm]],  # a norm, its input [N, C, ...], and the norm as kernels see it
    group: ProcessGroup | None,  # ranks that share the statistics, where they are several
    statistics: Callable[[Tensor], tuple[Tensor, Tensor]],  # [N, C, ...] -> mean and biased variance [C]
) -> tuple[Tensor, tuple[int | Tensor, ...]]:
    """The norms' table and counts by torch's operations; updates their running statistics."""
    state, counts, rows = state_dtype(given[0][1].dtype), [], []
    with torch.no_grad():
        for bn, y, norm in given:
            count, mean, variance = norm.count, norm.running_mean, norm.running_var
            if count != 0:  # torch 2.6 takes a symbol for its present value where it is asked whether it is true
                mean, variance = statistics(y.detach())
                if group is not None:
                    mean, variance, count = ranks.merged(mean, variance, count, group)
                if norm.num_batches_tracked is not None:
                    update_running_statistics(bn, mean, variance, count * norm.repeats)
            inverse_std = torch.rsqrt(variance.to(state) + norm.eps)
            affine = [None if parameter is None else parameter.to(state) for parameter in (norm.weight, norm.bias)]
            rows.append((mean.to(state), inverse_std, *affine))
            counts.append(count)
        return norms.table_of(rows), tuple(counts)
