"""Native CPU kernels of batch norm + residual + LIF; cpu.cpp says how they go through memory.

There is nothing to remember of launches here: a plan of its own lays the arguments of native code out.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..launch.cpu import DTYPES, run, structure
from ..lif.reference import state_dtype
from ..neuron.cpu import describe
from ..neuron.options import Options
from . import plan
from .norms import Norm
from .norms import scales as scales_of
from .plan import Kind
from .tensors import BackwardOutputs, Inputs, alike, backward_outputs, channels_of, dense, forward_outputs, inputs

_Arguments, _NormArguments = structure("BnLifArguments"), structure("NormArguments")
_OF_NORM = ("weight", "bias", "running_mean", "running_var", "batches")  # its tensors' names in NormArguments


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of y [N, C, ...], in the state's dtype."""
    y = dense(y)
    means, variances = (torch.empty(y.shape[1], dtype=state_dtype(y.dtype), device=y.device) for _ in range(2))
    _normalise("seal_bn_fill_table", y, {"y": y, "means": means, "variances": variances}, count=_per_channel(y))
    return means, variances


def fill_table(table: Tensor, index: int, y: Tensor, norm: Norm, *, launches: dict | None = None) -> None:
    """Write the table's rows of norm `index` for y [N, C, ...], and update the norm's running statistics."""
    y = dense(y)
    tensors = {**dict(zip(_OF_NORM, norm.tensors, strict=True)), "table": table, "y": y}
    _normalise("seal_bn_fill_table", y, tensors, index=index, norms=len(table) // 4, **_numbers(norm))


def forward(
    y: Tensor,  # this and residual as in tensors.py
    residual: Tensor | None,
    scales: Tensor | None,  # [2, C], or [4, C] where the residual has its own; None: those of `norms`
    options: Options,
    *,
    time_steps: int,
    static: bool,  # whether y is [B, C, ...], the same at each time step
    keep_m: bool,
    pack: bool,
    norms: tuple[Norm, ...] = (),
    launches: dict | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T·B, C, ...] in y's dtype and layout; if asked for, the membrane input, and the spikes as bits."""
    if scales is None:
        table = torch.empty(4 * len(norms), y.shape[1], dtype=state_dtype(y.dtype), device=y.device)
        for index, norm in enumerate(norms):
            fill_table(table, index, residual if index else y, norm)
        scales = scales_of(table)
    given = inputs(y, residual, time_steps, static=static)
    outputs = forward_outputs(given, keep_m=keep_m, pack=pack)
    _launch("seal_bn_lif_forward", given, scales, options, outputs._asdict(), _layout(given, len(scales) // 2))
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
    launches: dict | None = None,
) -> BackwardOutputs:
    """Gradients of the membrane input, of θ and 1/τ, and of the norms."""
    given = inputs(y, residual, time_steps, static=static)
    outputs = backward_outputs(given, len(counts), steps=steps, total=total, parameters=parameters)
    tensors = {"grad_spikes": alike(grad_spikes.to(y.dtype), given.y), **outputs._asdict()}
    of_norms = tensors.pop("grad_norms").unbind()
    if grad_m is not None:
        tensors["grad_m"] = alike(grad_m.to(y.dtype), given.y)
    arguments = _layout(given, len(counts))
    for i, (count, norm) in enumerate(zip(counts, _norms_of(arguments), strict=False)):
        norm.grad_weight, norm.grad_bias = (row.data_ptr() for row in of_norms[2 * i : 2 * i + 2])
        norm.count = count
    _launch("seal_bn_lif_backward", given, table, options, tensors, arguments)
    return outputs


def normalised_gradient(
    grad: Tensor, y: Tensor | None, coefficients: Tensor, *, in_place: bool, launches: dict | None = None
) -> Tensor:
    """c0 grad + c1 y + c2, or c0 grad without y, for coefficients [3, C]; in grad's memory with `in_place`."""
    grad = dense(grad)
    out = grad if in_place else torch.empty_like(grad)
    tensors = {"grad": grad, "out": out, "coefficients": coefficients, "y": None if y is None else alike(y, grad)}
    _normalise("seal_bn_normalised_gradient", grad, tensors, count=0 if y is None else _per_channel(grad))
    return out


class Plan(plan.Plan):
    """Calls of a layer, each of which is one call of native code, whose arguments are laid out once."""

    def __init__(
        self, kernel, y: Tensor, residual: Tensor | None, options: Options, norms: list[Norm], kind: Kind, group
    ):
        self.of_norms = [_numbers(norm) for norm in norms]
        super().__init__(kernel, y, residual, options, norms, kind, group)

    def lay(self, y: Tensor, residual: Tensor | None) -> None:  # noqa: D102
        super().lay(y, residual)
        kind = self.kind
        given = inputs(y, residual, kind.time_steps, static=kind.static)
        self.copies = given.y is not y or given.residual is not residual
        self.dtype, self.device, self.C, self.channel_stride = y.dtype, y.device, given.C, given.channel_stride
        batch = len(y) if kind.static else len(y) // kind.time_steps
        varies = given.y_stride or given.residual_stride
        self.row = (batch, *y.shape[1:])  # shapes of outputs, and their strides
        self.steps = (kind.time_steps * batch, *y.shape[1:])
        self.of_m = self.steps if varies else self.row
        self.strides = (y[0].numel(), *given.y.stride()[1:])
        self.packed = (kind.time_steps, (given.N + 7) // 8)
        self.arguments = _layout(given, len(self.counts))
        self.arguments.fills_table = True
        for numbers, into in zip(self.of_norms, _norms_of(self.arguments), strict=False):
            for name, value in numbers.items():
                setattr(into, name, value)
        self.constants = None
        if not self.learned:
            self.arguments.neuron, self.constants = self._neuron(self.options)

    def forward(self, y, residual, options, table, norms):  # noqa: D102
        if self.copies:
            y, residual = _copies(y, residual)
        arguments, kind = _Arguments.from_buffer_copy(self.arguments), self.kind
        spikes, m, packed = None, None, None
        arguments.y = y.data_ptr()
        if kind.dense:
            spikes = self._empty(self.steps)
            arguments.spikes = spikes.data_ptr()
        _add_residual(arguments, residual)
        if table is not None:
            arguments.table = table.data_ptr()
        if kind.keep_m:
            m = self._empty(self.of_m)
            arguments.m = m.data_ptr()
        if kind.pack:
            packed = torch.empty(self.packed, dtype=torch.uint8, device=self.device)
            arguments.packed = packed.data_ptr()
        for tensors, norm in zip(norms, _norms_of(arguments), strict=False):
            for name, tensor in zip(_OF_NORM, tensors, strict=True):
                if tensor is not None:
                    setattr(norm, name, tensor.data_ptr())
        self._run("seal_bn_lif_forward", arguments, options)
        return spikes, m, packed

    def backward(self, grad_spikes, grad_m, y, residual, options, table, needs):  # noqa: D102
        if self.copies:
            y, residual = _copies(y, residual)
        arguments = _Arguments.from_buffer_copy(self.arguments)
        grad_spikes = self._upstream(grad_spikes, y)
        arguments.y, arguments.grad_spikes, arguments.table = y.data_ptr(), grad_spikes.data_ptr(), table.data_ptr()
        _add_residual(arguments, residual)
        if grad_m is not None:
            grad_m = self._upstream(grad_m, y)
            arguments.grad_m = grad_m.data_ptr()
        # The gradients of y and residual are written where that of the membrane input is, unless both need it.
        (wants_y, wants_residual), (y_fixed, residual_fixed) = needs, self.fixed
        wants_residual = wants_residual and residual is not None
        grad_y = grad_residual = grad_steps = grad_total = grad_threshold = grad_inverse_tau = None
        if (wants_y and not y_fixed) or (wants_residual and not residual_fixed):
            grad_steps = self._empty(self.steps)
            arguments.grad_steps = grad_steps.data_ptr()
        if (wants_y and y_fixed) or (wants_residual and residual_fixed):
            grad_total = self._empty(self.row)
            arguments.grad_total = grad_total.data_ptr()
        if wants_residual:
            grad_residual = grad_total if residual_fixed else grad_steps
        if wants_y:
            grad_y = grad_total if y_fixed else grad_steps
            if grad_y is grad_residual:
                grad_y = self._empty(self.row if y_fixed else self.steps)
        if options.in_tensors:
            grad_threshold, grad_inverse_tau = (self._empty(self.row, self.state) for _ in range(2))
            arguments.grad_threshold = grad_threshold.data_ptr()
            arguments.grad_inverse_tau = grad_inverse_tau.data_ptr()
        grads = [grad_y, grad_residual, grad_threshold, grad_inverse_tau]
        for i, norm in enumerate(_norms_of(arguments)[: len(self.counts)]):
            if grads[i] is not None:
                norm.out = grads[i].data_ptr()
            weight = bias = None
            if self.dtypes[2 * i]:
                weight = torch.empty(self.C, dtype=self.state, device=self.device)
                norm.grad_weight = weight.data_ptr()
            if self.dtypes[2 * i + 1]:
                bias = torch.empty(self.C, dtype=self.state, device=self.device)
                norm.grad_bias = bias.data_ptr()
            grads += [weight, bias]
        self._run("seal_bn_lif_backward", arguments, options)
        return grads

    def _run(self, name: str, arguments: ctypes.Structure, options: Options) -> None:
        if self.constants is None:
            arguments.neuron, _constants = self._neuron(options)
        arguments.threads = torch.get_num_threads()
        run(name, arguments)

    def _neuron(self, options: Options) -> tuple[ctypes.Structure, Tensor]:
        return describe(options, self.state, self.device, self.channel_stride)

    def _upstream(self, grad: Tensor, y: Tensor) -> Tensor:
        if grad.dtype is self.dtype and grad.stride() == self.strides:
            return grad
        return alike(grad.to(self.dtype), y)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_strided(shape, self.strides, dtype=dtype or self.dtype, device=self.device)


def _add_residual(arguments: ctypes.Structure, residual: Tensor | None) -> None:
    """Spikes are read as bits where they are held as such (ops/_spike_tensor.py); others as numbers."""
    packed = getattr(residual, "packed", None)
    if packed is not None:
        arguments.residual_bits = packed.data_ptr()
    elif residual is not None:
        arguments.residual = residual.data_ptr()


def _copies(y: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    y = dense(y)
    return y, None if residual is None else alike(residual, y)


def _layout(given: Inputs, norms: int) -> ctypes.Structure:
    """Arguments for tensors that lie as these do."""
    return _Arguments(
        T=given.T,
        N=given.N,
        C=given.C,
        channel_stride=given.channel_stride,
        y_stride=given.y_stride,
        residual_stride=given.residual_stride,
        m_stride=given.N if given.y_stride or given.residual_stride else 0,
        dtype=DTYPES[given.y.dtype],
        normalised=norms == 2,
    )


def _norms_of(arguments: ctypes.Structure) -> tuple[ctypes.Structure, ctypes.Structure]:
    return arguments.norm, arguments.residual_norm


def _numbers(norm: Norm) -> dict[str, float]:
    return {"momentum": norm.momentum, "correction": norm.correction, "eps": norm.eps, "count": norm.count}


def _launch(
    name: str,
    given: Inputs,
    table: Tensor,
    options: Options,
    tensors: dict[str, Tensor | None],
    arguments: ctypes.Structure,
) -> None:
    if given.N == 0:
        return
    arguments.neuron, _constants = describe(options, table.dtype, table.device, given.channel_stride)
    for field, address in _pointers(tensors | {"y": given.y, "residual": given.residual, "table": table}).items():
        setattr(arguments, field, address)
    arguments.threads = torch.get_num_threads()
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


def _per_channel(y: Tensor) -> int:
    """Elements per channel."""
    return y.numel() // max(y.shape[1], 1)


def _pointers(tensors: dict[str, Tensor | None]) -> dict[str, int]:
    return {key: tensor.data_ptr() for key, tensor in tensors.items() if tensor is not None}
