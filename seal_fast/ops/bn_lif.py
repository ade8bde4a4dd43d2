"""Batch norm, residual and LIF in one operator."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..backends import resolve
from ..kernels.bn_lif import ranks, reference
from ..kernels.bn_lif.plan import Kind, Plan
from . import _neuron, _packed, _traced
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
from ._spike_tensor import SpikeTensor, is_plain_memory, plain
from .lif import lif as lif_operator
from .spike_conv import fires_bits

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
        spikes [T·B, C, ...] in the dtype of batch_norm(y) + residual, many on the CPU as a `SpikeTensor`; and with
        `return_membrane_input` that sum, of [B, C, ...] where nothing in it varies in time.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the backend of `lif` cannot run.
    """
    if isinstance(y, SpikeTensor) or isinstance(residual, SpikeTensor):
        y, residual = plain(y), _bits_or_numbers(residual, y, residual_bn, 0 if static else time_steps)
    kind = time_steps, bool(static), bool(return_membrane_input), _packed.wanted(), True
    key = None
    if not torch.compiler.is_compiling():
        try:
            learned = lif.tau, lif.v_threshold  # once in repeated calls, as a property may compute them
            tensors = [y, residual, *map(_neuron.tensor, learned), *tensors_of(bn)]
            of_norms = key_of_norm(bn)
            if residual_bn is not None:
                tensors += tensors_of(residual_bn)
                of_norms += key_of_norm(residual_bn)
            chosen = resolve(lif.backend, "bn_lif", y.device, y.dtype)
            if chosen == "cpu" and fires_bits(y, y.numel() * (time_steps if static else 1), time_steps):
                kind = *kind[:3], True, False
            key = chosen, kind, time_steps.__class__, _neuron.key_of(lif, learned), of_norms, key_of(tensors)
            plan = _plans.get(key)
        except NO_KEY:
            plan = None
        if plan is not None:
            return _run(plan, tensors)

    norms = [(bn, y)] if residual_bn is None else [(bn, y), (residual_bn, residual)]
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
    bits, as_numbers = isinstance(residual, SpikeTensor), (*kind[:3], _packed.wanted())
    if not is_eager(y, None if bits else residual, *learned) and group is None:
        return _traced.bn_lif(y, plain(residual), learned, numbers, given, as_numbers)
    fits = group is None and all(fits_kernels(*each) for each in given)
    if not (fits and chosen == "cpu"):
        residual, kind = plain(residual), (*as_numbers, True)
    of_kernel = _kernel(chosen).Plan if fits and chosen == "cpu" else Plan
    as_kernels_see = [norm for *_, norm in given]
    plan = of_kernel(
        _kernel(chosen), y, residual, _neuron.options_of(*learned, numbers), as_kernels_see, Kind(*kind), group
    )
    table = None
    if not fits:
        table, plan.counts = table_of(given, group, _kernel(chosen).statistics)
    elif key is not None:
        _plans[key] = plan
    return _run(plan, [y, residual, *learned, *(each for norm in as_kernels_see for each in norm.tensors)], table)


def _bits_or_numbers(residual: Tensor | None, y: Tensor, residual_bn: nn.Module | None, rows: int) -> Tensor | None:
    """Spikes as they are where a kernel reads their bits beside y, in so many rows, else as numbers."""
    if (
        isinstance(residual, SpikeTensor)
        and not torch.compiler.is_compiling()
        and residual_bn is None
        and residual.packed is not None
        and is_plain_memory(residual)
        and isinstance(y, Tensor)
        and (residual.shape, residual.stride(), residual.dtype) == (y.shape, y.stride(), y.dtype)
        and isinstance(rows, int)
        and rows > 0
        and y.numel() % (8 * rows) == 0
    ):
        return residual
    return plain(residual)


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


def _run(plan: Plan, tensors: list[Tensor | None], table: Tensor | None = None):
    """Call the operator.

    Args:
        plan: Of such calls.
        tensors: y, residual, tau, v_threshold, and the tensors of each norm as in `Norm`.
        table: The norms' table, where it is filled already.
    """
    inputs, norms = tensors[:4], [tensors[4:9], tensors[9:]][: len(tensors) // 5]
    for norm in norms:
        inputs += norm[:2]
    run = _Fused.apply if torch.is_grad_enabled() else functools.partial(_Fused.forward, None)
    spikes, m, packed = run(plan, norms, table, *inputs)
    kind = plan.kind
    if kind.pack and kind.dense:
        _packed.keep(spikes.unflatten(0, (kind.time_steps, -1)), packed)
    return (spikes, m) if kind.keep_m else spikes


class _Fused(torch.autograd.Function):
    """The operator on tensors that are at hand, over several ranks as well."""

    @staticmethod
    def forward(ctx, plan, norms, table, y, residual, tau, threshold, *parameters):
        if table is not None:
            norms = ()
        elif ctx is not None and True in ctx.needs_input_grad:
            table = plan.table(y)
        outputs = plan.forward(y, residual, plan.options.with_tensors(tau, threshold), table, norms)
        if outputs[0] is None:
            _, m, packed = outputs
            outputs = SpikeTensor.of(packed, plan.steps, plan.strides, plan.dtype), m, None
        if ctx is not None:
            # Of the norms' parameters all is in the table, and torch lets a bias change meanwhile.
            ctx.save_for_backward(y, residual, tau, threshold, table)
            ctx.plan = plan
            ctx.set_materialize_grads(False)
            if outputs[2] is not None:
                ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    def backward(ctx, grad_spikes, grad_m, _):
        refuse_batched("bn_lif", grad_spikes, grad_m)
        plan, (y, residual, tau, threshold, table) = ctx.plan, ctx.saved_tensors
        if grad_spikes is None:
            grad_spikes = plan.kind.no_gradient(y)

        def run():
            options = plan.options.with_tensors(tau, threshold)
            needs = ctx.needs_input_grad[3:5]
            grads = plan.for_layout(y, residual).backward(grad_spikes, grad_m, y, residual, options, table, needs)
            grads[2:4] = _neuron.parameter_gradients(*grads[2:4], tau, threshold)
            return grads

        return None, None, None, *once("bn_lif", run, grad_spikes, grad_m, y, residual, tau, threshold)


_kernel = functools.partial(kernel_module, "bn_lif")
