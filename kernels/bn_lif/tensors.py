"""What every launcher of these kernels reads and writes, in the layouts that kernels take.

y is [T·B, C, ...], T outermost, or [B, C, ...] where it is the same at each time step; residual likewise. Kernels see
each as T rows of N = B·C·… numbers, in the order in which they lie in memory, rows 0 apart where it is static. Neuron n
has channel n // channel_stride % C. Per-channel numbers are in the state's dtype: float32 for 16-bit y.

    m = (y scale + shift) + (residual residual_scale + residual_shift)

in this order, each operation rounded; a residual without a batch norm of its own is added as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch.layout import is_dense
from ..lif.reference import state_dtype


class Inputs(NamedTuple):
    """y and residual in one dense layout, and what kernels need to know of it."""

    y: Tensor
    residual: Tensor | None
    T: int
    N: int
    C: int
    channel_stride: int
    y_stride: int  # 0 where static, else N
    residual_stride: int


class ForwardOutputs(NamedTuple):
    """Empty outputs in the layout of y."""

    spikes: Tensor  # [T·B, C, ...]
    m: Tensor | None  # [T·B, C, ...], or [B, C, ...] where nothing in it varies in time
    packed: Tensor | None  # [T, ceil(N/8)] uint8


class BackwardOutputs(NamedTuple):
    """Empty gradients in the layout of y; what there is of each neuron or channel is in the state's dtype.

    With dm = ∂L/∂m, and k norms; see norms.py.
    """

    grad_steps: Tensor | None  # dm of each step [T·B, C, ...]
    grad_total: Tensor | None  # their sum over time [B, C, ...]
    grad_threshold: Tensor | None  # each neuron's part [B, C, ...], as the next
    grad_inverse_tau: Tensor | None
    sums: Tensor  # [k + 1, C]: Σ dm; Σ dm (y - mean); with a second norm Σ dm (residual - its mean)
    coefficients: Tensor  # [3k, C]: c0, c1, c2 of each norm's gradient c0 dm + c1 y + c2
    grad_norms: Tensor  # [2k, C]: gradients of weight and bias of each norm


def dense(y: Tensor) -> Tensor:
    """`y` itself if its rows y[0], y[1], … are dense and lie one after the other, else a copy of which this is true."""
    return y if is_dense(y) and (y.shape[0] < 2 or y.stride(0) == _row(y)) else y.contiguous()


def alike(tensor: Tensor, y: Tensor) -> Tensor:
    """`tensor` [rows, C, ...] itself if its rows lie as those of y, dense and one after the other; else a copy."""
    strides, own = (_row(y), *y.stride()[1:]), tensor.stride()
    if own == strides or all(size == 1 or a == b for size, a, b in zip(tensor.shape, own, strides, strict=True)):
        return tensor
    return _empty(tensor.shape[0], y, tensor.dtype).copy_(tensor)


def channels_of(y: Tensor) -> tuple[int, int]:
    """C and channel_stride."""
    return y.shape[1], y.stride(1) if y.shape[1] > 1 else 1


def inputs(y: Tensor, residual: Tensor | None, time_steps: int, *, static: bool) -> Inputs:
    """Both in place or, where no kernel takes their layout, copied."""
    y = dense(y)
    batch = y.shape[0] if static else y.shape[0] // time_steps
    N = batch * _row(y)
    if residual is not None:
        residual = alike(residual, y)
    varies = residual is not None and residual.shape[0] > batch
    return Inputs(y, residual, time_steps, N, *channels_of(y), 0 if static else N, N if varies else 0)


def forward_outputs(given: Inputs, *, keep_m: bool, pack: bool) -> ForwardOutputs:
    """Room for what the forward pass is asked for."""
    y, T = given.y, given.T
    batch = given.N // _row(y)
    rows = T * batch if given.y_stride or given.residual_stride else batch
    m = _empty(rows, y) if keep_m else None
    packed = torch.empty((T, (given.N + 7) // 8), dtype=torch.uint8, device=y.device) if pack else None
    return ForwardOutputs(_empty(T * batch, y), m, packed)


def backward_outputs(given: Inputs, norms: int, *, steps: bool, total: bool, parameters: bool) -> BackwardOutputs:
    """Room for what the backward pass is asked for, of a layer of so many batch norms."""
    y, state = given.y, state_dtype(given.y.dtype)
    batch = given.N // _row(y)
    return BackwardOutputs(
        _empty(given.T * batch, y) if steps else None,
        _empty(batch, y) if total else None,
        *(_empty(batch, y, state) if parameters else None for _ in range(2)),
        *(torch.empty(size, given.C, dtype=state, device=y.device) for size in (norms + 1, 3 * norms, 2 * norms)),
    )


def _row(y: Tensor) -> int:
    """Elements of y[0]."""
    return y.numel() // y.shape[0]


def _empty(rows: int, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    strides = (_row(y), *y.stride()[1:])
    return torch.empty_strided((rows, *y.shape[1:]), strides, dtype=dtype or y.dtype, device=y.device)
