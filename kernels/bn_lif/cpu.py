"""Native CPU kernels of batch norm + residual + LIF; cpu.cpp says how they go through memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..launch.cpu import DTYPES, run
from ..lif.reference import state_dtype
from ..neuron.cpu import Neuron, describe
from ..neuron.options import Options
from . import norms
from .norms import Norm
from .tensors import BackwardOutputs, Inputs, alike, backward_outputs, channels_of, dense, forward_outputs, inputs


class _Arguments(ctypes.Structure):
    """As BnLifArguments in cpu.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("y", "residual", "spikes", "m", "packed", "grad_spikes", "grad_m", "grad_steps", "grad_total"),
                *("grad_threshold", "grad_inverse_tau", "scales", "means", "sums"),
            )
        ),
        *((name, ctypes.c_int64) for name in ("T", "N", "C", "channel_stride")),
        *((name, ctypes.c_int64) for name in ("y_stride", "residual_stride", "m_stride")),
        ("neuron", Neuron),
        *((name, ctypes.c_int32) for name in ("dtype", "normalised", "threads")),
    )


class _NormArguments(ctypes.Structure):
    """As NormArguments in cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "grad", "out", "coefficients", "pivots", "sums")),
        *((name, ctypes.c_int64) for name in ("total", "C", "channel_stride")),
        *((name, ctypes.c_int32) for name in ("dtype", "threads")),
    )


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of y [N, C, ...], in the state's dtype."""
    y = dense(y)
    C = y.shape[1]
    state = state_dtype(y.dtype)
    # Sums of distances from a number near the mean keep their digits where the mean is far from 0.
    few = y[:4].flatten(2)[..., :4] if y.dim() > 2 else y[:16]
    pivots = few.to(state).mean([axis for axis in range(few.dim()) if axis != 1])
    threads = torch.get_num_threads()
    sums = torch.zeros(threads, 2, C, dtype=torch.float64)
    _normalise("seal_bn_statistics", y, y=y, pivots=pivots, sums=sums, threads=threads)
    distance, square = sums.sum(0) / (y.numel() // C)
    mean = pivots + distance
    return mean.to(state), (square - distance * distance).clamp_min(0).to(state)


def fill_table(table: Tensor, index: int, y: Tensor, norm: Norm) -> None:
    """Rows of the norm of this index of what it makes of y [N, C, ...]; its running statistics see y."""
    norms.fill_table(table, index, norm, *statistics(y) if norm.count else (None, None))


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
    _launch("seal_bn_lif_forward", given, scales, options, **outputs._asdict())
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
    sums = torch.zeros(torch.get_num_threads(), 1 + len(counts), given.C, dtype=torch.float64)
    upstream = {"grad_spikes": alike(grad_spikes.to(y.dtype), given.y)}
    if grad_m is not None:
        upstream["grad_m"] = alike(grad_m.to(y.dtype), given.y)
    written = {name: tensor for name, tensor in outputs._asdict().items() if name.startswith("grad_")}
    del written["grad_norms"]
    _launch(
        "seal_bn_lif_backward",
        given,
        norms.scales(table),
        options,
        means=norms.means(table),
        sums=sums,
        **upstream,
        **written,
    )
    outputs.sums.copy_(sums.sum(0))
    outputs.coefficients.copy_(norms.coefficients_of(table, outputs.sums, counts))
    outputs.grad_norms.copy_(norms.parameter_gradients_of(table, outputs.sums))
    return outputs


def normalised_gradient(grad: Tensor, y: Tensor | None, coefficients: Tensor, *, in_place: bool) -> Tensor:
    """c0 grad + c1 y + c2, or c0 grad without y, for coefficients [3, C]; in grad's memory with `in_place`."""
    grad = dense(grad)
    out = grad if in_place else torch.empty_like(grad)
    given = {} if y is None else {"y": alike(y, grad)}
    _normalise("seal_bn_normalised_gradient", grad, grad=grad, out=out, coefficients=coefficients, **given)
    return out


def _launch(name: str, given: Inputs, scales: Tensor, options: Options, **tensors: Tensor | None) -> None:
    if given.N == 0:
        return
    neuron, _constants = describe(options, scales.dtype, given.y[: given.N // given.y[0].numel()])
    tensors |= {"y": given.y, "residual": given.residual, "scales": scales}
    arguments = _Arguments(
        **{key: tensor.data_ptr() for key, tensor in tensors.items() if tensor is not None},
        T=given.T,
        N=given.N,
        C=given.C,
        channel_stride=given.channel_stride,
        y_stride=given.y_stride,
        residual_stride=given.residual_stride,
        m_stride=given.N if given.y_stride or given.residual_stride else 0,
        neuron=neuron,
        dtype=DTYPES[given.y.dtype],
        normalised=len(scales) == 4,
        threads=torch.get_num_threads(),
    )
    run(name, arguments)


def _normalise(name: str, rows: Tensor, *, threads: int | None = None, **tensors: Tensor) -> None:
    C, channel_stride = channels_of(rows)
    arguments = _NormArguments(
        **{key: tensor.data_ptr() for key, tensor in tensors.items()},
        total=rows.numel(),
        C=C,
        channel_stride=channel_stride,
        dtype=DTYPES[rows.dtype],
        threads=threads or torch.get_num_threads(),
    )
    run(name, arguments)
