"""The multi-step leaky integrate-and-fire neuron."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..backends import is_transformed, resolve
from ..kernels.launch.layout import as_rows, empty_rows
from ..kernels.lif import reference
from ..kernels.lif.plan import Plan
from ..kernels.packing.reference import bytes_of, pack
from ..kernels.surrogate.reference import Surrogate
from . import _neuron, _packed
from ._arguments import neuron_options, require_device, require_float_tensor, require_per_channel, shape
from ._dispatch import NO_KEY, Plans, is_eager, kernel_module, key_of, needs_graph, once, refuse_batched
from ._spike_tensor import SpikeTensor, plain
from .spike_conv import fires_bits


def lif(
    x: Tensor,
    *,
    tau: float | Tensor = 2.0,
    decay_input: bool = True,
    v_threshold: float | Tensor = 1.0,
    v_reset: float | None = 0.0,
    surrogate: str | Surrogate = "sigmoid",
    detach_reset: bool = False,
    v_init: Tensor | None = None,
    return_v_last: bool = True,
    return_packed: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """Run LIF neurons over all T time steps.

    Charge is h = v + (x - (v - v_reset))/tau, or h = v - (v - v_reset)/tau + x without `decay_input`; a spike fires
    where h >= v_threshold; then v is set to v_reset, or lowered by v_threshold where v_reset is None (soft reset). The
    derivative of the spike is the surrogate's.

    Args:
        x: Input current [T, ...], in any strides; float16, bfloat16, float32 or float64.
        tau: Membrane time constant in time steps, at least 1. A float, or a tensor, scalar or [C] for x [T, B, C, ...],
            which may take a gradient. Without `decay_input` it may be infinite: neurons that do not leak.
        decay_input: Whether the input is divided by tau as well.
        v_threshold: Firing threshold; a float or a tensor, as tau.
        v_reset: Potential after a spike; None for soft reset.
        surrogate: Name of the surrogate gradient, a `Surrogate` with its own alpha, or one of SpikingJelly's modules.
        detach_reset: Whether the reset passes no gradient to the spike.
        v_init: Membrane potential before the first step, shape of x[0]. None: v_reset, or 0 with soft reset.
        return_v_last: Whether v_last is wanted; else None takes its place, and it is not written.
        return_packed: Whether to return the spikes as bits as well.
        backend: "auto", "triton", "cupy", "cpu" or "torch". Only "torch" can be differentiated twice, or transformed by
            torch.func and forward-mode AD, where "auto" takes it.

    Returns:
        spikes: 0 or 1, with the shape, dtype and strides of x; many spikes on the CPU as a `SpikeTensor`.
        v_last: Membrane potential after the last step, shape of x[0]; float32 for 16-bit x, else x's dtype.
        packed: With `return_packed`; uint8 [T, ceil(N/8)], where N neurons lie in memory in the order of x[0]: bit i of
            byte j is the spike of neuron 8j + i.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the named backend cannot run.
    """
    x, wanted = plain(x), (bool(return_v_last), bool(return_packed), _packed.wanted())
    key, dense = None, True
    if not torch.compiler.is_compiling():
        try:
            tensors = x, v_init, _neuron.tensor(tau), _neuron.tensor(v_threshold)
            neuron = decay_input, v_reset, detach_reset
            chosen = resolve(backend, "lif", x.device)
            dense = chosen != "cpu" or bool(return_packed) or not fires_bits(x, x.numel(), len(x))
            key = chosen, dense, *_key(tensors, tau, v_threshold, surrogate, neuron, wanted)
            plan = _plans.get(key)
        except NO_KEY:
            plan = None
        if plan is not None:
            return _run(plan, tensors, wanted)

    require_float_tensor("x", x, "[T, ...]")
    if x.dim() < 1 or x.shape[0] == 0:
        raise ValueError(f"x must be [T, ...] with at least one time step; got {shape(x)}.")
    options = neuron_options(tau, decay_input, v_threshold, v_reset, surrogate, detach_reset)
    require_per_channel("tau", tau, "x", x, dim=2)
    require_per_channel("v_threshold", v_threshold, "x", x, dim=2)
    if v_init is not None:
        require_float_tensor("v_init", v_init, "with the shape of x[0]")
        require_device("v_init", v_init, "x", x)
        if v_init.shape != x.shape[1:]:
            raise ValueError(f"v_init must have the shape of x[0], {list(x.shape[1:])}; got {shape(v_init)}.")
    chosen = resolve(backend, "lif", x.device)
    if chosen == "torch":
        spikes, v_last = reference.lif(x, v_init=_carried(v_init), **options)
        packed = pack(spikes.detach()) if any(wanted[1:]) else None
        return _outputs(spikes, v_last, packed, wanted)
    numbers, learned = _neuron.numbers_of(options, chosen)
    if is_eager(x, v_init, *learned):
        of_kernel = _kernel(chosen).Plan if chosen == "cpu" else Plan
        options, pack_too = _neuron.options_of(*learned, numbers), not dense or any(wanted[1:])
        plan = of_kernel(_kernel(chosen), x, options, return_v_last, pack_too, dense=dense)
        if key is not None:
            _plans[key] = plan
        return _run(plan, (x, v_init, *learned), wanted)
    return _outputs(*_lif(x, v_init, *learned, *numbers, return_v_last, any(wanted[1:])), wanted)


_plans = Plans()


def _key(tensors, tau, threshold, surrogate, neuron, wanted) -> tuple:
    kind = surrogate if type(surrogate) is str else (type(surrogate), surrogate.name, surrogate.alpha)
    values = *neuron, *(None if isinstance(value, Tensor) else value for value in (tau, threshold))
    return kind, wanted, values, *map(type, values), key_of(tensors)


def _run(plan, tensors, wanted):
    outputs = _Eager.apply(plan, *tensors) if needs_graph(*tensors) else _Eager.forward(None, plan, *tensors)
    return _outputs(*outputs, wanted)


def _outputs(spikes, v_last, packed, wanted):
    """What the operator returns of it, after a context of packed spikes has seen it."""
    return_v_last, return_packed, keep = wanted
    if keep and not isinstance(spikes, SpikeTensor):
        _packed.keep(spikes, packed)
    outputs = spikes, v_last if return_v_last else None
    return (*outputs, packed) if return_packed else outputs


_OPTIONS = f"Tensor? tau_tensor, Tensor? threshold_tensor, {_neuron.SCHEMA}"


_kernel = functools.partial(kernel_module, "lif")


def _forward(x, v_init, *arguments):
    *options, keep_v, pack = arguments
    outputs = _kernel(options[-1]).forward(
        x, v_init, _neuron.options_of(*options[:2], options[2:]), keep_v=keep_v, pack=pack
    )
    return tuple(x.new_empty(0) if output is None else output for output in outputs)


_lif = torch.library.custom_op(
    "seal_fast::lif",
    _forward,
    mutates_args=(),
    schema=f"(Tensor x, Tensor? v_init, {_OPTIONS}, bool keep_v, bool pack) -> (Tensor, Tensor, Tensor)",
)


@_lif.register_fake
def _(x, v_init, *arguments):
    *_, keep_v, pack = arguments
    spikes = empty_rows(as_rows(x))
    v_last = torch.empty_like(spikes[0], dtype=reference.state_dtype(x.dtype)) if keep_v else x.new_empty(0)
    return spikes, v_last, x.new_empty(bytes_of(x), dtype=torch.uint8) if pack else x.new_empty(0)


def _run_backward(grad_spikes, grad_v_last, x, v_init, tau_tensor, threshold_tensor, *options):
    learned = tau_tensor is not None or threshold_tensor is not None
    options = (tau_tensor, threshold_tensor, *options)
    grads = _kernel(options[-1]).backward(
        grad_spikes, grad_v_last, x, v_init, _neuron.options_of(*options[:2], options[2:]), parameters=learned
    )
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


_lif_backward = torch.library.custom_op(
    "seal_fast::lif_backward",
    _run_backward,
    mutates_args=(),
    schema=(
        f"(Tensor grad_spikes, Tensor? grad_v_last, Tensor x, Tensor? v_init, {_OPTIONS}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
)


@_lif_backward.register_fake
def _(grad_spikes, grad_v_last, x, v_init, tau_tensor, threshold_tensor, *options):
    grad_x = empty_rows(as_rows(x))
    learned = tau_tensor is not None or threshold_tensor is not None
    dtype = reference.state_dtype(x.dtype)
    return grad_x, *(
        torch.empty_like(grad_x[0], dtype=dtype) if wanted else x.new_empty(0)
        for wanted in (v_init is not None, learned, learned)
    )


def _save(ctx, inputs, output):
    x, v_init, tau_tensor, threshold_tensor, *ctx.options, ctx.keep_v, _ = inputs
    ctx.save_for_backward(x, v_init, tau_tensor, threshold_tensor)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_spikes, grad_v_last, _):
    x, v_init, tau, threshold = _saved(ctx)
    grads = _lif_backward(
        *(_or_zeros(grad_spikes, x), grad_v_last if ctx.keep_v else None, x, v_init, tau, threshold, *ctx.options)
    )
    return *_of_inputs(grads, v_init, tau, threshold), *[None] * (len(ctx.options) + 2)


def _saved(ctx) -> tuple[Tensor | None, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(_SECOND_TIME) from None


def _or_zeros(grad_spikes: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x[:1]).expand_as(x) if grad_spikes is None else grad_spikes


def _of_inputs(grads, v_init, tau, threshold) -> list[Tensor | None]:
    """Of x, v_init, tau and v_threshold, from what kernels give."""
    grad_x, grad_v_init, grad_threshold, grad_inverse_tau = grads
    grad_v_init = None if v_init is None else grad_v_init.to(v_init.dtype)
    return [grad_x, grad_v_init, *_neuron.parameter_gradients(grad_threshold, grad_inverse_tau, tau, threshold)]


class _Eager(torch.autograd.Function):
    """The operator without its registration, on tensors that are at hand."""

    @staticmethod
    def forward(ctx, plan, x, v_init, tau, threshold):
        outputs = plan.forward(x, v_init, plan.options.with_tensors(tau, threshold))
        if outputs[0] is None:
            _, v_last, packed = outputs
            outputs = SpikeTensor.of(packed, plan.shape, plan.strides, plan.dtype), v_last, None
        if ctx is not None:
            ctx.save_for_backward(x, v_init, tau, threshold)
            ctx.set_materialize_grads(False)
            ctx.plan = plan
            if outputs[2] is not None:
                ctx.mark_non_differentiable(outputs[2])
        return outputs

    @staticmethod
    def backward(ctx, grad_spikes, grad_v_last, _):
        refuse_batched("lif", grad_spikes, grad_v_last)
        x, v_init, tau, threshold = _saved(ctx)

        def run():
            options = ctx.plan.options.with_tensors(tau, threshold)
            plan = ctx.plan.for_layout(x, options)
            grads = plan.backward(_or_zeros(grad_spikes, x), grad_v_last, x, v_init, options)
            return _of_inputs(grads, v_init, tau, threshold)

        return None, *once("lif", run, grad_spikes, grad_v_last, x, v_init, tau, threshold)


class _Carried(torch.autograd.Function):
    """A potential that an earlier call left, whose graph may be gone when a backward pass comes to it."""

    @staticmethod
    def forward(ctx, v):
        ctx.node = v.grad_fn
        return v.view_as(v)

    @staticmethod
    def backward(ctx, grad_v):
        if torch._C._will_engine_execute_node(ctx.node):
            _require_saved(ctx.node)
        return grad_v


def _carried(v: Tensor | None) -> Tensor | None:
    if v is None or torch.compiler.is_compiling() or v.grad_fn is None:
        return v
    return _Carried.apply(v) if torch.is_grad_enabled() and not is_transformed() else v


def _require_saved(node: torch.autograd.graph.Node, most: int = 16) -> None:
    """Raise where the saved tensors of the spike function, one of a graph's last nodes, have been freed."""
    nodes = [node]
    for node in nodes:  # which grows
        if hasattr(type(node), "_raw_saved_tensors"):
            try:
                node._raw_saved_tensors  # noqa: B018  unlike saved_tensors it calls no hook
            except RuntimeError as error:
                raise RuntimeError(_SECOND_TIME) from error
            return
        nodes += [following for following, _ in node.next_functions if following and len(nodes) < most]


_SECOND_TIME = (
    "backward came a second time to a call of spiking neurons, whose saved tensors the first pass has freed. Where "
    "their potential was carried on from the call before, seal_fast.nn.reset_net(network) before each batch lets them "
    "start at rest, and detach_net(network) keeps the potential without its graph; else pass retain_graph=True to the "
    "first pass."
)


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError("lif can be differentiated twice only with backend='torch'.")


_lif.register_autograd(_backward, setup_context=_save)
_lif_backward.register_autograd(_refuse_second_derivative, setup_context=lambda ctx, inputs, output: None)
