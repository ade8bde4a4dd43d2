"""Batch norm, residual and LIF in one operator."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..backends import resolve
from ..kernels.bn_lif import ranks, reference
from ..kernels.bn_lif.plan import Kind, Plan
from ..kernels.bn_lif.tensors import backward_outputs, forward_outputs, inputs
from ..kernels.lif.reference import state_dtype
from ..kernels.neuron.options import Options
from . import _neuron, _packed
from ._arguments import (
    NEURON_OPTIONS,
    neuron_options,
    require_device,
    require_float_tensor,
    require_integer,
    require_per_channel,
    shape,
)
from ._dispatch import NO_KEY, Plans, is_eager, kernel_module, key_of, once, refuse_batched
from ._normalise import can_fuse, fits_kernels, key_of_norm, norm_of, table_of, tensors_of
from .lif import lif as lif_operator

_OPTIONS = (*NEURON_OPTIONS, "backend")


def bn_lif(
    y: Tensor,
    bn: nn.Module,
    lif: nn.Module,
    *,
    time_steps: int,
    residual: Tensor | None = None,
    residual_bn: nn.Module | None = None,
    static: bool = False,
    return_membrane_input: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Spikes of LIF neurons driven by batch_norm(y) + residual, each neuron starting at rest.

    Args:
        y: Convolution output [T·B, C, ...], T outermost; with `static`, [B, C, ...], the same at each time step.
        bn: nn.BatchNorm1d, 2d or 3d, SpikingJelly's layers of these names, or nn.SyncBatchNorm. In training mode its
            running statistics are updated as if it had seen all T·B rows, also where y is static. Where it has hooks it
            is called, and nothing is fused.
        lif: A LIFNode, whose options (tau, v_threshold, …) and backend are used, and whose state is not.
        time_steps: T.
        residual: Added after batch norm; [T·B, C, ...], or [B, C, ...] for one that is the same at each time step.
        residual_bn: A batch norm that the residual passes first; its output is not kept for the backward pass.
        static: Whether y holds one frame for all time steps.
        return_membrane_input: Whether to return batch_norm(y) + residual as well, for pre-activation networks.

    Returns:
        spikes [T·B, C, ...] in the dtype of batch_norm(y) + residual; and with `return_membrane_input` that sum, of
        [B, C, ...] where nothing in it varies in time.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the backend of `lif` cannot run.
    """
    kind = Kind(time_steps, static, return_membrane_input, _packed.wanted())
    norms = [(bn, y)] if residual_bn is None else [(bn, y), (residual_bn, residual)]
    key = tensors = None
    if not torch.compiler.is_compiling():
        try:
            tensors = [tensors_of(module) for module, _ in norms]
            learned = lif.tau, lif.v_threshold
            key = _key(y, residual, lif, learned, kind, norms, tensors)
            plan = _plans.get(key)
        except NO_KEY:
            plan = None
        if plan is not None:
            return _run(plan, y, residual, learned, tensors)

    batch = _check(y, bn, lif, time_steps, residual, residual_bn, static)
    chosen = resolve(lif.backend, "bn_lif", y.device, y.dtype)
    alike = residual is None or residual.dtype == y.dtype
    groups = {ranks.synchronised(module) for module, _ in norms}
    if chosen == "torch" or not alike or len(groups) > 1 or not all(can_fuse(module) for module, _ in norms):
        steps, membrane_input = reference.membrane_input(
            y, bn, time_steps=time_steps, residual=residual, residual_bn=residual_bn, static=static
        )
        options = {name: getattr(lif, name) for name in _OPTIONS}
        spikes = lif_operator(steps, return_v_last=False, **options)[0].flatten(0, 1)
        return (spikes, membrane_input) if return_membrane_input else spikes

    numbers, learned = _neuron.numbers_of(neuron_options(*(getattr(lif, name) for name in NEURON_OPTIONS)), chosen)
    (group,) = groups
    repeats = [time_steps if static else 1]
    if residual_bn is not None:
        repeats.append(1 if residual.shape[0] > batch else time_steps)
    given = [(*norm, norm_of(*norm, each, group)) for norm, each in zip(norms, repeats, strict=True)]
    if not is_eager(y, residual, *learned) and group is None:
        return _traced(y, residual, learned, numbers, given, kind)
    fits = group is None and all(fits_kernels(*each) for each in given)
    of_kernel = _kernel(chosen).Plan if fits and chosen == "cpu" else Plan
    options = _neuron.options_of(*learned, numbers)
    plan = of_kernel(_kernel(chosen), y, residual, options, [norm for *_, norm in given], kind, group)
    tensors = [norm.tensors for *_, norm in given]
    if fits:
        if key is not None:
            _plans[key] = plan
        return _run(plan, y, residual, learned, tensors)
    table, plan.counts = table_of(given, group, _kernel(chosen).statistics)
    return _run(plan, y, residual, learned, tensors, table)


def _check(y, bn, lif, time_steps, residual, residual_bn, static) -> int:
    """B, or an error in a sentence."""
    require_float_tensor("y", y, "[T·B, C, ...]")
    for name, module in (("bn", bn), ("residual_bn", residual_bn)):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) and (module is not None or name == "bn"):
            raise TypeError(f"{name} must be a BatchNorm or SyncBatchNorm module; got {type(module).__name__}.")
        if isinstance(module, LazyModuleMixin):
            raise TypeError(f"{name} must know its channels, as once it has been called; got {type(module).__name__}.")
    missing = [name for name in _OPTIONS if not hasattr(lif, name)]
    if missing:
        raise TypeError(f"lif must be a LIFNode; got {type(lif).__name__}, which has no {missing[0]}.")
    require_integer("time_steps", time_steps, 1)
    if y.dim() < 2 or y.shape[1] != bn.num_features:
        raise ValueError(f"y must be [T·B, {bn.num_features}, ...], the channels of bn; got {shape(y)}.")
    bn._check_input_dim(y)
    batch = y.shape[0] if static else y.shape[0] // time_steps
    if y.numel() == 0 or batch == 0 or (not static and y.shape[0] % time_steps):
        raise ValueError(f"y must have T·B rows with T = {time_steps} time steps; got {shape(y)}.")
    for name in ("tau", "v_threshold"):
        require_per_channel(name, getattr(lif, name), "y", y, dim=1)
    _check_norm("bn", bn, "y", y)
    if residual is not None:
        require_float_tensor("residual", residual, "[T·B, C, ...]")
        require_device("residual", residual, "y", y)
        if residual.shape[1:] != y.shape[1:] or residual.shape[0] not in (batch, time_steps * batch):
            rows = f"[{time_steps * batch} or {batch}, {', '.join(map(str, y.shape[1:]))}]"
            raise ValueError(f"residual must be {rows} for y {shape(y)}; got {shape(residual)}.")
    if residual_bn is not None:
        if residual is None:
            raise ValueError("residual_bn needs a residual to normalise; got None.")
        if residual_bn.num_features != y.shape[1]:
            raise ValueError(f"residual_bn must have {y.shape[1]} channels, as y; got {residual_bn.num_features}.")
        _check_norm("residual_bn", residual_bn, "residual", residual)
    return batch


def _check_norm(name: str, bn: nn.Module, input_name: str, y: Tensor) -> None:
    dtype, device = y.dtype, y.device
    for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        if tensor is None or (tensor.dtype is dtype and tensor.device == device):
            continue
        require_device(name, tensor, input_name, y)
        if tensor.dtype is not dtype and not (dtype.itemsize == 2 and tensor.dtype is torch.float32):
            allowed = f"{input_name}'s dtype, {dtype}, or float32 for 16-bit {input_name}"
            raise TypeError(f"{name} must be of {allowed}; got {tensor.dtype}.")


_plans = Plans()


def _key(y, residual, lif, learned, kind, norms, tensors) -> tuple:
    surrogate = lif.surrogate
    neuron = lif.decay_input, lif.v_reset, surrogate.name, surrogate.alpha, lif.detach_reset, *map(key_of, learned)
    chosen = resolve(lif.backend, "bn_lif", y.device, y.dtype)
    of_norms = [key_of_norm(module, own) for (module, _), own in zip(norms, tensors, strict=True)]
    return chosen, kind, neuron, key_of(y), key_of(residual), *of_norms


def _run(
    plan: Plan,
    y: Tensor,
    residual: Tensor | None,
    learned: tuple[float | Tensor | None, ...],  # tau and v_threshold
    tensors: list[tuple[Tensor | None, ...]],  # of each norm, as in Norm
    table: Tensor | None = None,  # where it is filled already
):
    parameters = [parameter for own in tensors for parameter in own[:2]]
    run = _Fused.apply if torch.is_grad_enabled() else functools.partial(_Fused.forward, None)
    spikes, m, packed = run(plan, tensors, table, y, residual, *map(_neuron.tensor, learned), *parameters)
    kind = plan.kind
    if kind.pack:
        _packed.keep(spikes.unflatten(0, (kind.time_steps, -1)), packed)
    return (spikes, m) if kind.keep_m else spikes


class _Fused(torch.autograd.Function):
    """The operator on tensors that are at hand, over several ranks as well."""

    @staticmethod
    def forward(ctx, plan, tensors, table, y, residual, tau, threshold, *parameters):
        norms = tensors if table is None else ()
        if table is None and ctx is not None and any(ctx.needs_input_grad):
            table = plan.table(y)
        outputs = plan.forward(y, residual, plan.options.with_tensors(tau, threshold), table, norms)
        if ctx is not None:
            # Of the norms' parameters all is in the table, and torch lets a bias change meanwhile.
            ctx.save_for_backward(y, residual, tau, threshold, table)
            ctx.plan, ctx.dtypes = plan, [None if each is None else each.dtype for each in parameters]
            ctx.set_materialize_grads(False)
            if outputs[2] is not None:
                ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    def backward(ctx, grad_spikes, grad_m, _):
        refuse_batched("bn_lif", grad_spikes, grad_m)
        plan, (y, residual, tau, threshold, table) = ctx.plan, ctx.saved_tensors
        if grad_spikes is None:
            grad_spikes = _no_gradient(y, plan.kind)

        def run():
            options = plan.options.with_tensors(tau, threshold)
            grads = plan.backward(grad_spikes, grad_m, y, residual, options, table, ctx.needs_input_grad[3:5])
            return _of_inputs(grads, tau, threshold, ctx.dtypes)

        return None, None, None, *once("bn_lif", run, grad_spikes, grad_m, y, residual)


def _no_gradient(y: Tensor, kind: Kind) -> Tensor:
    return y.new_zeros(()).expand(y.shape[0] * (kind.time_steps if kind.static else 1), *y.shape[1:])


def _of_inputs(grads: list, tau: Tensor | None, threshold: Tensor | None, dtypes: list) -> list[Tensor | None]:
    """Of y, residual, tau, v_threshold and the norms' parameters, in the place of what a layer's backward pass gave."""
    grads[2:4] = _neuron.parameter_gradients(*grads[2:4], tau, threshold)
    for place, dtype in enumerate(dtypes, start=4):
        if dtype is None:
            grads[place] = None
        elif grads[place].dtype is not dtype:
            grads[place] = grads[place].to(dtype)
    return grads


_kernel = functools.partial(kernel_module, "bn_lif")


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
    def rest(self) -> dict:
        """What forward and backward of a kernel take besides tensors."""
        return {"time_steps": self.time_steps, "static": self.static}

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


def _traced(y, residual, learned, numbers, given, kind):
    """The operator in a graph of torch.compile or torch.export, and on tensors whose elements may be elsewhere."""
    table, counts = table_of(given, None, functools.partial(_statistics, backend=numbers[-1]))
    parameters = *(parameter for *_, norm in given for parameter in norm.tensors[:2]), None, None
    call = _Call(y, residual, *learned, *parameters[:4], table, *(*counts, 0)[:2], numbers, *kind)
    spikes, m, packed = _bn_lif(*call.flat())
    if kind.pack:
        _packed.keep(spikes.unflatten(0, (kind.time_steps, -1)), packed)
    return (spikes, m) if kind.keep_m else spikes


def _plan(call: _Call) -> Plan:
    kind = Kind(call.time_steps, call.static, call.keep_m, call.pack)
    plan = Plan(_kernel(call.numbers[-1]), call.y, call.residual, call.options, [], kind)
    plan.counts = call.counts
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
    given = inputs(call.y, call.residual, **call.rest)
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
    given = inputs(call.y, call.residual, **call.rest)
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
        grad_spikes = _no_gradient(call.y, call)
    needs = ctx.needs_input_grad[:2]
    grads = _bn_lif_backward(grad_spikes, grad_m if call.keep_m else None, *call.flat(), *needs)
    grad_y, grad_residual, *others = _of_inputs(list(grads), call.tau, call.threshold, ctx.dtypes)
    rest = [None] * (len(ctx.rest) + 1)
    return grad_y if needs[0] else None, grad_residual if needs[1] else None, *others, *rest


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError("bn_lif can be differentiated twice only with backend='torch'.")


_bn_lif.register_autograd(_registered_gradients, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output))
_bn_lif_backward.register_autograd(_refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)
