"""Batch norm → (sum) → neuron in one operator, where nobody could tell it from one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.bn_lif.reference import has_step_modes
from ..ops._normalise import can_fuse, has_hooks
from .neuron import BaseNode

_DIMENSIONS = {"BatchNorm1d": (3, 4), "BatchNorm2d": (5,), "BatchNorm3d": (6,)}  # of inputs in step mode "m"
_OF_ROWS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def normalises_steps(module: nn.Module) -> bool:
    """Whether the module is a batch norm for [T, B, C, ...]: SpikingJelly's."""
    return has_step_modes(module)


def normalises_rows(module: nn.Module) -> bool:
    """Whether the module is a batch norm for [T·B, C, ...]: torch's."""
    return type(module) in _OF_ROWS


def run_layer(
    neuron: nn.Module,
    bn: nn.Module,  # one that normalises steps
    y: Tensor,  # [T, B, C, ...]
    residual: Tensor | None,
    residual_bn: nn.Module | None,
) -> Tensor:
    """neuron(bn(y) + residual_bn(residual))."""
    norms = (bn,) if residual_bn is None else (bn, residual_bn)
    alike = residual is None or (isinstance(residual, Tensor) and residual.shape == y.shape)
    if not alike or not _can_run(neuron) or not all(_can_normalise(norm, y) for norm in norms):
        m = bn(y)
        if residual is not None:
            m = m + (residual if residual_bn is None else residual_bn(residual))
        return neuron(m)
    if residual is not None:
        residual = residual.flatten(0, 1)
    return _run(neuron, bn, y.flatten(0, 1), y.shape, residual=residual, residual_bn=residual_bn)


def run_rows(
    neuron: nn.Module,
    bn: nn.Module,  # one that normalises rows
    y: Tensor,  # [T·B, C, ...]
    steps: Tensor,  # y in the shape that the neuron sees
    contiguous: bool,  # whether the neuron's input is made contiguous
) -> Tensor:
    """neuron(bn(y).reshape(steps.shape))."""
    split = steps.dim() == y.dim() + 1 and steps.shape[2:] == y.shape[1:]
    if not split or not normalises_rows(bn) or not can_fuse(bn) or not _can_run(neuron):
        m = bn(y).reshape(steps.shape)
        return neuron(m.contiguous() if contiguous else m)
    spikes = _run(neuron, bn, y, steps.shape)
    return spikes.contiguous() if contiguous else spikes


def _run(neuron: nn.Module, bn: nn.Module, rows: Tensor, shape: torch.Size, **residual) -> Tensor:
    spikes = ops.bn_lif(rows, bn, neuron, time_steps=shape[0], **residual)
    neuron.mark_unknown()
    return spikes.unflatten(0, shape[:2])


def _can_run(neuron: nn.Module) -> bool:
    return (
        isinstance(neuron, BaseNode)
        and neuron.step_mode == "m"
        and not neuron.store_v_seq
        and neuron.at_rest
        and not has_hooks(neuron)
        and not _global_hooks()
    )


def _can_normalise(bn: nn.Module, y: Tensor) -> bool:
    return has_step_modes(bn) and bn.step_mode == "m" and can_fuse(bn) and y.dim() in _DIMENSIONS[type(bn).__name__]


def _global_hooks() -> bool:
    of_all = nn.modules.module
    forward = of_all._global_forward_hooks or of_all._global_forward_pre_hooks
    return bool(forward or of_all._global_backward_hooks or of_all._global_backward_pre_hooks)
