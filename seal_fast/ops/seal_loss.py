"""The selective-alignment distillation loss (SeAl-KD, arXiv 2605.14252)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..backends import resolve
from ..kernels.lif.reference import state_dtype
from ..kernels.seal_loss import reference
from ..kernels.seal_loss.plan import Options, Plan
from ._arguments import not_dense, require_device, require_float_tensor, require_number, shape
from ._dispatch import NO_KEY, Plans, is_eager, kernel_module, key_of, needs_graph, once, refuse_batched

OBJECTIVES = ("seal", "kd", "tdkd")


class LossParts(NamedTuple):
    """The loss, which carries the gradient to the logits, and its parts, detached."""

    loss: torch.Tensor
    ce: torch.Tensor
    ela: torch.Tensor
    sta: torch.Tensor


def seal_loss(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float = 3.0,
    objective: str = "seal",
    backend: str = "auto",
) -> LossParts:
    """CE + alpha·ELA + beta·STA of a student's logits at each time step.

    ELA aligns each step with the teacher, but not on the class that the step gets wrong; STA aligns each step with the
    sample's other steps, weighted by their confidence and similarity.

    Args:
        logits: Student logits [T, B, K]; the only input that gets a gradient.
        teacher_logits: Teacher logits [B, K].
        labels: Class indices [B], int64 or int32, in [0, K). Samples labelled -100 are ignored in every part.
        alpha: Weight of ELA, at least 0.
        beta: Weight of STA, at least 0.
        temperature: Softens both distributions; above 0.
        objective: "seal"; or for comparison "kd", CE + alpha·KD at each step, or "tdkd" (arXiv 2501.15925),
            CE + alpha·KD + beta·KD against the mean of the sample's correct steps. There the parts ela and sta hold the
            terms that alpha and beta weigh; sta is 0 for "kd".
        backend: "auto", "triton", "cupy", "cpu" or "torch".

    Returns:
        (loss, ce, ela, sta), scalars; float32 for 16-bit logits, else the dtype of the logits. As in cross-entropy, the
        loss is NaN where every sample is ignored.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the named backend cannot run. Label values are
            checked on the CPU only: reading them from a GPU would wait for it.
    """
    key, tensors = None, (logits, teacher_logits, labels)
    if not torch.compiler.is_compiling():
        try:
            numbers = alpha, beta, temperature, objective
            chosen = resolve(backend, "seal_loss", logits.device, logits.dtype, logits.shape[0])
            key = chosen, needs_graph(logits), numbers, *map(type, numbers), key_of(tensors)
            plan = _plans.get(key)
        except NO_KEY:
            plan = None
        if plan is not None:
            return _run(plan, *tensors)

    _require_logits(logits)
    T, B, K = logits.shape
    require_float_tensor("teacher_logits", teacher_logits, "[B, K]")
    require_device("teacher_logits", teacher_logits, "logits", logits)
    if teacher_logits.shape != (B, K):
        raise ValueError(f"teacher_logits must be [{B}, {K}] for logits {shape(logits)}; got {shape(teacher_logits)}.")
    _require_labels(labels, logits)
    require_number("alpha", alpha, at_least=0.0)
    require_number("beta", beta, at_least=0.0)
    require_number("temperature", temperature, above=0.0)
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}.")
    chosen = resolve(backend, "seal_loss", logits.device, logits.dtype, T)
    # The CPU's kernel looks at the labels itself.
    read = labels.device.type == "cpu" and chosen != "cpu" and _readable(labels)
    if read:
        reference.require_classes(labels, K)
    if chosen == "torch":
        parts = reference.seal_loss(
            logits, teacher_logits, labels, alpha=alpha, beta=beta, temperature=temperature, objective=objective
        )
        return LossParts(*parts)
    numbers, gradient = (float(alpha), float(beta), float(temperature), objective), needs_graph(logits)
    if not is_eager(*tensors):
        return LossParts(*_loss(logits, teacher_logits.detach(), labels, *numbers, chosen, gradient)[:4])
    of_kernel = _kernel(chosen).Plan if chosen == "cpu" else Plan
    plan = of_kernel(_kernel(chosen), *tensors, Options(*numbers, gradient))
    if key is not None and not read:
        _plans[key] = plan
    return _run(plan, *tensors)


_plans = Plans()


def _run(plan: Plan, logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> LossParts:
    others = teacher_logits.detach() if teacher_logits.requires_grad else teacher_logits, labels
    if plan.options.gradient:
        loss, parts = _Eager.apply(plan, logits, others)
    else:
        (loss, *parts), _ = _parts(plan, logits, *others)
    return LossParts(loss, *parts)


def _parts(plan, *tensors):
    parts, grad = plan.forward(*tensors)
    return parts.unbind(0), grad


def selective_alignment_weights(logits: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """What the loss aligns with what: the weights of STA and the confidence of each time step.

    Args:
        logits: Student logits [T, B, K].
        backend: "auto", "triton", "cupy", "cpu" or "torch".

    Returns:
        weights: [B, T, T]; row i holds the weights of the other steps in the target of step i and sums to 1; the
            diagonal is 0. All 0 where T = 1.
        confidence: [T, B]; 1 - entropy/ln K.

    Raises:
        TypeError: logits is not a floating-point tensor.
        ValueError: logits has the wrong shape, or the named backend cannot run.
    """
    _require_logits(logits)
    chosen = resolve(backend, "selective_alignment_weights", logits.device, logits.dtype, len(logits))
    if chosen == "torch":
        return reference.selective_alignment_weights(logits)
    return _weights(logits.detach(), chosen)


def _require_logits(logits: torch.Tensor) -> None:
    require_float_tensor("logits", logits, "[T, B, K]")
    if logits.dim() != 3 or logits.shape[0] < 1 or logits.shape[1] < 1 or logits.shape[2] < 2:
        raise ValueError(f"logits must be [T, B, K] with T and B at least 1 and K at least 2; got {shape(logits)}.")


def _require_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    B = logits.shape[1]
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor of class indices [B]; got {type(labels).__name__}.")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32; got {labels.dtype}.")
    if labels.layout is not torch.strided:
        raise not_dense("labels", labels)
    require_device("labels", labels, "logits", logits)
    if labels.shape != (B,):
        raise ValueError(f"labels must be [{B}] for logits {shape(logits)}; got {shape(labels)}.")


def _readable(labels: torch.Tensor) -> bool:
    """Whether their values are known now, and not those of a trace or of a vmap's samples."""
    return not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(labels)


_kernel = functools.partial(kernel_module, "seal_loss")


_SCHEMA = (
    "(Tensor logits, Tensor teacher_logits, Tensor labels, float alpha, float beta, float temperature, "
    "str objective, str backend, bool gradient)"
)


def _forward(logits, teacher_logits, labels, alpha, beta, temperature, objective, backend, gradient):
    options = Options(alpha, beta, temperature, objective, gradient)
    parts, grad = _parts(
        Plan(_kernel(backend), logits, teacher_logits, labels, options), logits, teacher_logits, labels
    )
    # Outputs of a registered operator are tensors that share no memory.
    if grad is None:
        grad = logits.new_empty(0, dtype=reference.gradient_dtype(logits.dtype))
    return *(part.clone() for part in parts), grad


_loss = torch.library.custom_op(
    "seal_fast::seal_loss", _forward, mutates_args=(), schema=f"{_SCHEMA} -> ({', '.join(['Tensor'] * 5)})"
)


@_loss.register_fake
def _(logits, teacher_logits, labels, alpha, beta, temperature, objective, backend, gradient):
    dtype = state_dtype(logits.dtype)
    grad_dtype = reference.gradient_dtype(logits.dtype)
    grad = torch.empty(logits.shape if gradient else 0, dtype=grad_dtype, device=logits.device)
    return *(logits.new_empty((), dtype=dtype) for _ in range(4)), grad


@torch.library.custom_op(
    "seal_fast::selective_alignment_weights",
    mutates_args=(),
    schema="(Tensor logits, str backend) -> (Tensor, Tensor)",
)
def _weights(logits, backend):
    return _kernel(backend).weights(logits)


@_weights.register_fake
def _(logits, backend):
    T, B, _ = logits.shape
    dtype = state_dtype(logits.dtype)
    return logits.new_empty((B, T, T), dtype=dtype), logits.new_empty((T, B), dtype=dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[4])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 9
    (grad,) = ctx.saved_tensors
    return (grad * grad_loss).to(ctx.dtype), *[None] * 8


_loss.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator without its registration: what forward stored is scaled in place where its dtype is the logits'."""

    @staticmethod
    def forward(ctx, plan, logits, others):  # in a tuple, what needs no gradient takes less of the host's time
        (loss, *parts), ctx.grad = _parts(plan, logits, *others)
        ctx.save_for_backward(logits, *others)
        ctx.plan = plan
        # A view could not be changed in place, as `loss /= 2`; what is in the list is no output to autograd.
        return loss.data, parts

    @staticmethod
    def backward(ctx, grad_loss, _):
        refuse_batched("seal_loss", grad_loss)

        def run():
            grad, ctx.grad = ctx.grad, None
            if grad is None:  # the graph was retained for another pass: only then what was given must be unchanged
                _, grad = ctx.plan.for_layout(*ctx.saved_tensors).forward(*ctx.saved_tensors)
            return [ctx.plan.scaled(grad, grad_loss)]

        inputs = ctx.saved_tensors[:1] if torch.is_grad_enabled() else ()
        return None, *once("seal_loss", run, *inputs), None
