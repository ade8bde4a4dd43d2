"""The operator bn_lif as torch.compile, torch.export and tensors whose elements may be elsewhere need it: registered.

What follows from the norms' statistics is made by torch's operations here, so that a graph sees running statistics
change.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.bn_lif.plan import Kind, Plan
from ..kernels.bn_lif.tensors import backward_outputs, forward_outputs, inputs
from ..kernels.lif.reference import state_dtype
from ..kernels.neuron.options import Options
from . import _neuron, _packed
from ._dispatch import kernel_module
from ._normalise import table_of

_kernel = functools.partial(kernel_module, "bn_lif")


def bn_lif(y, residual, learned, numbers, given, kind):
    """The operator in a graph of torch.compile or torch.export, and on tensors whose elements may be elsewhere."""
    table, counts = table_of(given, None, functools.partial(_statistics, backend=numbers[-1]))
    parameters = *(parameter for *_, norm in given for parameter in (norm.weight, norm.bias)), None, None
    call = _Call(y, residual, *learned, *parameters[:4], table, *(*counts, 0)[:2], numbers, *kind)
    spikes, m, packed = _bn_lif(*call.flat())
    if call.pack:
        _packed.keep(spikes.unflatten(0, (call.time_steps, -1)), packed)
    return (spikes, m) if call.keep_m else spikes


_statistics = torch.library.custom_op(
    "seal_fast::batch_statistics",
    lambda y, backend: _kernel(backend).statistics(y),
    mutates_args=(),
    schema="(Tensor y, str backend) -> (Tensor, Tensor)",
)


@_statistics.register_fake
def _(y, backend):
    return tuple(y.new_empty(y.shape[1], dtype=state_dtype(y.dtype)) for _ in range(2))


class _Call(NamedTuple):
    """All that the operator takes, in the order of its schema."""

    y: Tensor
    residual: Tensor | None
    tau: Tensor | None
    threshold: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual_weight: Tensor | None
    residual_bias: Tensor | None
    table: Tensor  # as in kernels/bn_lif/norms.py, as are the counts
    count: int
    residual_count: int
    numbers: tuple
    time_steps: int
    static: bool
    keep_m: bool
    pack: bool

    @classmethod
    def parse(cls, flat: tuple) -> _Call:
        """What `flat` gave."""
        return cls(*flat[:11], flat[11:-4], *flat[-4:])

    def flat(self) -> tuple:
        """The arguments of the registered operator."""
        values = tuple(self)  # torch 2.6 cannot compile a slice of a named one
        return (*values[:11], *self.numbers, *values[12:])

    @property
    def counts(self) -> tuple[int | Tensor, ...]:
        """Of the norms in the table."""
        return (self.count, self.residual_count)[: len(self.table) // 4]

    @property
    def kind(self) -> Kind:
        """What calls have in common."""
        return Kind(self.time_steps, self.static, self.keep_m, self.pack)

    @property
    def options(self) -> Options:
        """Those of the neuron."""
        return _neuron.options_of(self.tau, self.threshold, self.numbers)


_SCHEMA = (
    "Tensor y, Tensor? residual, Tensor? tau_tensor, Tensor? threshold_tensor, Tensor? weight, Tensor? bias, "
    "Tensor? residual_weight, Tensor? residual_bias, Tensor table, SymInt count, SymInt residual_count, "
    f"{_neuron.SCHEMA}, int time_steps, bool static, bool keep_m, bool pack"
)
_TENSORS = 9  # the first of the arguments


def _plan(call: _Call) -> Plan:
    plan = Plan(_kernel(call.numbers[-1]), call.y, call.residual, call.options, [], call.kind)
    plan.counts, plan.dtypes = call.counts, [plan.state] * (2 * len(call.counts))
    return plan


def _forward(*flat):
    call = _Call.parse(flat)
    return _or_empty(call.y, _plan(call).forward(call.y, call.residual, call.options, call.table, []))


def _or_empty(like: Tensor, outputs) -> tuple[Tensor, ...]:
    """What a registered operator returns: tensors."""
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


_bn_lif = torch.library.custom_op(
    "seal_fast::bn_lif",
    _forward,
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)


@_bn_lif.register_fake
def _(*flat):
    call = _Call.parse(flat)
    given = inputs(call.y, call.residual, call.time_steps, static=call.static)
    return _or_empty(call.y, forward_outputs(given, keep_m=call.keep_m, pack=call.pack))


def _backward(grad_spikes, grad_m, *arguments):
    """Gradients of y, residual, θ, 1/τ (each neuron's part) and the norms' four parameters; empty where not wanted."""
    *flat, needs_y, needs_residual = arguments
    call = _Call.parse(tuple(flat))
    grads = _plan(call).backward(
        grad_spikes, grad_m, call.y, call.residual, call.options, call.table, (needs_y, needs_residual)
    )
    grads = _or_empty(grad_spikes, (*grads, *[None] * (8 - len(grads))))
    return *grads[:4], *(grad.clone() for grad in grads[4:])  # a registered operator's outputs share no memory


_bn_lif_backward = torch.library.custom_op(
    "seal_fast::bn_lif_backward",
    _backward,
    mutates_args=(),
    schema=(
        f"(Tensor grad_spikes, Tensor? grad_m, {_SCHEMA}, bool needs_y, bool needs_residual) -> "
        f"({', '.join(['Tensor'] * 8)})"
    ),
)


@_bn_lif_backward.register_fake
def _(grad_spikes, grad_m, *arguments):
    *flat, needs_y, needs_residual = arguments
    call = _Call.parse(tuple(flat))
    given = inputs(call.y, call.residual, call.time_steps, static=call.static)
    parameters = call.tau is not None or call.threshold is not None
    outputs = backward_outputs(given, len(call.counts), steps=True, total=False, parameters=parameters)
    rows = [given.y if needs_y else None, given.residual if needs_residual else None]
    grads = [None if row is None else torch.empty_like(row) for row in rows]
    grads += [*outputs[2:4], *map(torch.empty_like, outputs.grad_norms)]
    return _or_empty(call.y, (*grads, *[None] * (8 - len(grads))))


def _save(ctx, flat, output):
    *tensors, weight, bias, residual_weight, residual_bias, table = flat[:_TENSORS]
    ctx.save_for_backward(*tensors, table)
    parameters = weight, bias, residual_weight, residual_bias
    ctx.dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
    ctx.rest = flat[_TENSORS:]
    ctx.set_materialize_grads(False)


def _registered_gradients(ctx, grad_spikes, grad_m, _):
    *tensors, table = ctx.saved_tensors
    call = _Call.parse((*tensors, *[None] * len(ctx.dtypes), table, *ctx.rest))
    if grad_spikes is None:
        grad_spikes = call.kind.no_gradient(call.y)
    needs = ctx.needs_input_grad[:2]
    grads = _bn_lif_backward(grad_spikes, grad_m if call.keep_m else None, *call.flat(), *needs)
    grad_y, grad_residual, grad_threshold, grad_inverse_tau, *of_norms = grads
    return (
        grad_y if needs[0] else None,
        grad_residual if needs[1] else None,
        *_neuron.parameter_gradients(grad_threshold, grad_inverse_tau, call.tau, call.threshold),
        *(None if dtype is None else grad.to(dtype) for dtype, grad in zip(ctx.dtypes, of_norms, strict=True)),
        *[None] * (len(ctx.rest) + 1),
    )


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError("bn_lif can be differentiated twice only with backend='torch'.")


_bn_lif.register_autograd(_registered_gradients, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output))
_bn_lif_backward.register_autograd(_refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)
