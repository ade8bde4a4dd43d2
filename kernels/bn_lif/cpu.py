"""Native CPU kernels of batch norm + residual + LIF; cpu.cpp says how they go through memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch.cpu import DTYPES, run, structure
from ..lif.reference import state_dtype
from ..neuron.cpu import describe
from ..neuron.options import Options
from .norms import Norm
from .tensors import BackwardOutputs, Inputs, alike, backward_outputs, channels_of, dense, forward_outputs, inputs

_Arguments, _NormArguments = structure("BnLifArguments"), structure("NormArguments")


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of y [N, C, ...], in the state's dtype."""
    y = dense(y)
    means, variances = (torch.empty(y.shape[1], dtype=state_dtype(y.dtype), device=y.device) for _ in range(2))
    _normalise("seal_bn_fill_table", y, {"y": y, "means": means, "variances": variances})
    return means, variances


def fill_table(table: Tensor, index: int, y: Tensor, norm: Norm) -> None:
    """Write the table's rows of norm `index` for y [N, C, ...], and update the norm's running statistics."""
    y = dense(y)
    tensors = dict(zip(("weight", "bias", "running_mean", "running_var", "batches"), norm, strict=False))
    numbers = {"momentum": norm.momentum, "correction": norm.correction, "eps": norm.eps}
    tensors |= {"table": table, "y": y if norm.count else None}
    _normalise("seal_bn_fill_table", y, tensors, index=index, norms=len(table) // 4, **numbers)


def forward(
    y: Tensor,  # this and residual as in tensors.py
    residual: Tensor | None,
    scales: Tensor,  # [2, C], or [4, C] where the residual has its own
    options: Options,
    *,
    time_steps: int,
    static: bool,  # whether y is [B, C, ...], the same at each time step
    keep_m: bool,
    pack: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T·B, C, ...] in y's dtype and layout; if asked for, the membrane input, and the spikes as bits."""
    given = inputs(y, residual, time_steps, static=static)
    outputs = forward_outputs(given, keep_m=keep_m, pack=pack)
    _launch("seal_bn_lif_forward", given, scales, options, outputs._asdict(), normalised=len(scales) == 4)
    return tuple(outputs)


def backward(
    grad_spikes: Tensor,  # [T·B, C, ...]
    grad_m: Tensor | None,  # as the membrane input
    y: Tensor,
    residual: Tensor | None,
    table: Tensor,  # [4, C], or [8, C] where the residual has its own norm
    options: Options,
    *,
    counts: tuple[int, ...],  # of each norm in the table
    time_steps: int,
    static: bool,
    steps: bool,
    total: bool,
    parameters: bool,
) -> BackwardOutputs:
    """Gradients of the membrane input, of θ and 1/τ, and of the norms."""
    given = inputs(y, residual, time_steps, static=static)
    outputs = backward_outputs(given, len(counts), steps=steps, total=total, parameters=parameters)
    tensors = {**outputs._asdict(), "grad_spikes": alike(grad_spikes.to(y.dtype), given.y)}
    if grad_m is not None:
        tensors["grad_m"] = alike(grad_m.to(y.dtype), given.y)
    normalised = len(counts) == 2
    numbers = {"normalised": normalised, "count": counts[0], "residual_count": counts[1] if normalised else 0}
    _launch("seal_bn_lif_backward", given, table, options, tensors, **numbers)
    return outputs


def normalised_gradient(grad: Tensor, y: Tensor | None, coefficients: Tensor, *, in_place: bool) -> Tensor:
    """c0 grad + c1 y + c2, or c0 grad without y, for coefficients [3, C]; in grad's memory with `in_place`."""
    grad = dense(grad)
    out = grad if in_place else torch.empty_like(grad)
    tensors = {"grad": grad, "out": out, "coefficients": coefficients, "y": None if y is None else alike(y, grad)}
    _normalise("seal_bn_normalised_gradient", grad, tensors)
    return out


def _launch(
    name: str, given: Inputs, table: Tensor, options: Options, tensors: dict[str, Tensor | None], **numbers: int
) -> None:
    if given.N == 0:
        return
    neuron, _constants = describe(options, table.dtype, given.y[: given.N // given.y[0].numel()])
    tensors |= {"y": given.y, "residual": given.residual, "table": table}
    arguments = _Arguments(
        **_pointers(tensors),
        T=given.T,
        N=given.N,
        C=given.C,
        channel_stride=given.channel_stride,
        y_stride=given.y_stride,
        residual_stride=given.residual_stride,
        m_stride=given.N if given.y_stride or given.residual_stride else 0,
        neuron=neuron,
        dtype=DTYPES[given.y.dtype],
        threads=torch.get_num_threads(),
        **numbers,
    )
    run(name, arguments)


def _normalise(name: str, rows: Tensor, tensors: dict[str, Tensor | None], **numbers: float) -> None:
    C, channel_stride = channels_of(rows)
    arguments = _NormArguments(
        **_pointers(tensors),
        total=rows.numel(),
        C=C,
        channel_stride=channel_stride,
        dtype=DTYPES[rows.dtype],
        threads=torch.get_num_threads(),
        **numbers,
    )
    run(name, arguments)


def _pointers(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {key: tensor.data_ptr() for key, tensor in tensors.items() if tensor is not None}
