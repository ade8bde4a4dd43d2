"""Native CPU kernel of the selective-alignment loss; cpu.cpp says how it goes through memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..launch.cpu import DTYPES, code, run, structure
from ..lif.reference import state_dtype
from . import plan
from .plan import Options
from .reference import gradient_dtype, require_classes

_Arguments, _Scaled = structure("LossArguments"), structure("ScaleArguments")


def forward(
    logits: Tensor,  # [T, B, K]
    teacher_logits: Tensor,  # [B, K]
    labels: Tensor,  # [B]
    *,
    alpha: float,
    beta: float,
    temperature: float,
    objective: str,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss, ce, ela and sta [4] in the state's dtype; and the loss's gradient [T, B, K] in gradient_dtype."""
    options = Options(alpha, beta, temperature, objective, gradient)
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    return Plan(None, logits, teacher_logits, labels, options).forward(logits, teacher_logits, labels)


class Plan(plan.Plan):
    """Calls whose arguments to native code are laid out once."""

    def __init__(self, kernel, logits, teacher_logits, labels, options):
        super().__init__(kernel, logits, teacher_logits, labels, options)
        self.shape, self.device, self.state = logits.shape, logits.device, state_dtype(logits.dtype)
        self.grad_dtype, self.copies = gradient_dtype(logits.dtype), logits.stride(2) != 1
        self.converts = teacher_logits.dtype is not self.state or not teacher_logits.is_contiguous()
        self.gathers = not labels.is_contiguous()
        self.arguments = _layout(logits.contiguous() if self.copies else logits, options.objective)
        self.arguments.wide_labels = labels.dtype == torch.int64
        for name in ("alpha", "beta", "temperature"):
            setattr(self.arguments, name, getattr(options, name))

    def forward(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: D102
        logits = logits.contiguous() if self.copies else logits
        teacher_logits = teacher_logits.to(self.state).contiguous() if self.converts else teacher_logits
        labels = labels.contiguous() if self.gathers else labels
        parts, grad = torch.empty(4, dtype=self.state, device=self.device), None
        arguments = _Arguments.from_buffer_copy(self.arguments)
        arguments.logits, arguments.teacher = logits.data_ptr(), teacher_logits.data_ptr()
        arguments.labels, arguments.parts = labels.data_ptr(), parts.data_ptr()
        if self.options.gradient:
            grad = torch.empty(self.shape, dtype=self.grad_dtype, device=self.device)
            arguments.grad = grad.data_ptr()
        arguments.threads = torch.get_num_threads()
        run("seal_loss", arguments)
        if arguments.outside:
            require_classes(labels, self.shape[2])
        return parts, grad


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense `grad` in gradient_dtype times a scalar tensor, in the dtype of the logits.

    Where that is grad's own, it is multiplied in place, and neither read nor written if the factor is 1.
    """
    if grad.dtype == dtype and factor.item() == 1:  # both are in the CPU's memory: nothing is waited for
        return grad
    result = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    factor, wide = factor.to(state_dtype(dtype)), None if result is grad else grad.data_ptr()
    pointers = {"values": result.data_ptr(), "wide": wide, "factor": factor.data_ptr()}
    run("seal_scale", _Scaled(**pointers, count=grad.numel(), dtype=DTYPES[dtype]))
    return result


def weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, T, T] of the other steps in each step's target, and confidence [T, B]."""
    T, B, _ = logits.shape
    dtype = state_dtype(logits.dtype)
    weights, confidence = (torch.empty(size, dtype=dtype, device=logits.device) for size in ((B, T, T), (T, B)))
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    arguments = _layout(logits, "seal")
    arguments.logits, arguments.temperature, arguments.threads = logits.data_ptr(), 1.0, torch.get_num_threads()
    arguments.weights, arguments.confidence = weights.data_ptr(), confidence.data_ptr()
    run("seal_loss", arguments)
    return weights, confidence


def _layout(logits: Tensor, objective: str) -> ctypes.Structure:
    """Arguments for logits that lie as these do, each row contiguous."""
    (T, B, K), (stride_t, stride_b, _) = logits.shape, logits.stride()
    return _Arguments(
        T=T,
        B=B,
        K=K,
        stride_t=stride_t,
        stride_b=stride_b,
        dtype=DTYPES[logits.dtype],
        objective=code("Objective", objective),
    )
