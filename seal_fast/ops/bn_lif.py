"""Batch norm, residual and LIF in one operator."""

from __future__ import annotations

import torch
from torch import nn

from ..backends import resolve
from ..kernels.bn_lif import reference
from ._arguments import (
    NEURON_OPTIONS,
    require_device,
    require_float_tensor,
    require_integer,
    require_per_channel,
    shape,
)
from .lif import lif as lif_operator


def bn_lif(
    y: torch.Tensor,
    bn: nn.Module,
    lif: nn.Module,
    *,
    time_steps: int,
    residual: torch.Tensor | None = None,
    static: bool = False,
    return_membrane_input: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Spikes of LIF neurons driven by batch_norm(y) + residual, each neuron starting at rest.

    Args:
        y: Convolution output [T·B, C, ...], T outermost; with `static`, [B, C, ...], the same at each time step.
        bn: nn.BatchNorm1d, 2d, 3d or nn.SyncBatchNorm. In training mode its running statistics are updated as if it had
            seen all T·B rows, also where y is static (where its forward hooks are not called).
        lif: A LIFNode, whose options (tau, v_threshold, …) and backend are used, and whose state is not.
        time_steps: T.
        residual: Added after batch norm; [T·B, C, ...], or [B, C, ...] for one that is the same at each time step.
        static: Whether y holds one frame for all time steps.
        return_membrane_input: Whether to return batch_norm(y) + residual as well, for pre-activation networks.

    Returns:
        spikes [T·B, C, ...] in the dtype of batch_norm(y) + residual; and with `return_membrane_input` that sum, of
        [B, C, ...] where nothing in it varies in time.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the backend of `lif` cannot run.
    """
    require_float_tensor("y", y, "[T·B, C, ...]")
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"bn must be a BatchNorm or SyncBatchNorm module; got {type(bn).__name__}.")
    missing = [name for name in (*NEURON_OPTIONS, "backend") if not hasattr(lif, name)]
    if missing:
        raise TypeError(f"lif must be a LIFNode; got {type(lif).__name__}, which has no {missing[0]}.")
    require_integer("time_steps", time_steps, 1)
    if y.dim() < 2 or y.shape[1] != bn.num_features:
        raise ValueError(f"y must be [T·B, {bn.num_features}, ...], the channels of bn; got {shape(y)}.")
    batch = y.shape[0] if static else y.shape[0] // time_steps
    if batch == 0 or (not static and y.shape[0] % time_steps):
        raise ValueError(f"y must have T·B rows with T = {time_steps} time steps; got {shape(y)}.")
    for name in ("tau", "v_threshold"):
        require_per_channel(name, getattr(lif, name), y.unsqueeze(0) if static else y.unflatten(0, (time_steps, -1)))
    for tensor in (bn.weight, bn.running_mean):
        if tensor is not None:
            require_device("bn", tensor, "y", y)
            if y.dtype != tensor.dtype and not (y.dtype.itemsize == 2 and tensor.dtype == torch.float32):
                raise TypeError(f"bn must be of y's dtype, {y.dtype}, or float32 for 16-bit y; got {tensor.dtype}.")
    if residual is not None:
        require_float_tensor("residual", residual, "[T·B, C, ...]")
        require_device("residual", residual, "y", y)
        if residual.shape[1:] != y.shape[1:] or residual.shape[0] not in (batch, time_steps * batch):
            rows = f"[{time_steps * batch} or {batch}, {', '.join(map(str, y.shape[1:]))}]"
            raise ValueError(f"residual must be {rows} for y {shape(y)}; got {shape(residual)}.")
    resolve(lif.backend, "bn_lif", y.device)
    steps, membrane_input = reference.membrane_input(y, bn, time_steps=time_steps, residual=residual, static=static)
    options = {name: getattr(lif, name) for name in (*NEURON_OPTIONS, "backend")}
    spikes = lif_operator(steps, return_v_last=False, **options)[0].flatten(0, 1)
    return (spikes, membrane_input) if return_membrane_input else spikes
