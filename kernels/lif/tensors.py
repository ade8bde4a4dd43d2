"""What every launcher of the neuron's kernels reads and writes, in the layouts that kernels take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch.layout import as_rows, empty_rows, like_row, like_rows
from ..packing.reference import bytes_of
from .reference import state_dtype


class ForwardTensors(NamedTuple):
    """Rows of x and spikes are dense, [T, ...]; the potentials lie as x[0] does, in the state's dtype."""

    x: Tensor
    v_init: Tensor | None
    spikes: Tensor
    v_last: Tensor | None
    packed: Tensor | None  # [T, ceil(N/8)] uint8


class BackwardTensors(NamedTuple):
    """As ForwardTensors; the last two are each neuron's part in the gradients of θ and 1/τ."""

    grad_spikes: Tensor
    grad_v_last: Tensor | None
    x: Tensor
    v_init: Tensor | None
    grad_x: Tensor
    grad_v_init: Tensor | None
    grad_threshold: Tensor | None
    grad_inverse_tau: Tensor | None


def forward_tensors(x: Tensor, v_init: Tensor | None, *, keep_v: bool, pack: bool) -> ForwardTensors:
    """The inputs of a forward pass in place or, where no kernel takes their layout, copied; and its empty outputs."""
    x = as_rows(x)
    spikes = empty_rows(x)
    v_last = torch.empty_like(spikes[0], dtype=state_dtype(x.dtype)) if keep_v else None
    packed = torch.empty(bytes_of(x), dtype=torch.uint8, device=x.device) if pack else None
    return ForwardTensors(x, _state_row(v_init, x), spikes, v_last, packed)


def backward_tensors(
    grad_spikes: Tensor, grad_v_last: Tensor | None, x: Tensor, v_init: Tensor | None, *, parameters: bool
) -> BackwardTensors:
    """The same of a backward pass; with `parameters`, also the parts in the gradients of θ and 1/τ."""
    x = as_rows(x)
    grad_x = empty_rows(x)
    wanted = (v_init is not None, parameters, parameters)
    rows = [torch.empty_like(grad_x[0], dtype=state_dtype(x.dtype)) if want else None for want in wanted]
    upstream = like_rows(grad_spikes.to(x.dtype), x), _state_row(grad_v_last, x)
    return BackwardTensors(*upstream, x, _state_row(v_init, x), grad_x, *rows)


def _state_row(row: Tensor | None, x: Tensor) -> Tensor | None:
    return None if row is None else like_row(row.to(state_dtype(x.dtype)), x[0])
