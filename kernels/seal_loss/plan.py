"""Calls of the loss with tensors of one layout, by the kernels of any room."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """What calls of the loss have in common besides the layout of their tensors."""

    alpha: float
    beta: float
    temperature: float
    objective: str
    gradient: bool  # whether the gradient is made as well


class Plan:
    """What calls that differ in their tensors' elements alone share. A room's own may find out more, once.

    Args:
        kernel: The room's module.
        logits: Of the student [T, B, K], or a tensor like them; this and what follows as in reference.py.
        teacher_logits: [B, K].
        labels: [B].
        options: What else the calls have in common.
    """

    def __init__(self, kernel: ModuleType, logits: Tensor, teacher_logits: Tensor, labels: Tensor, options: Options):
        self.kernel, self.options, self.dtype = kernel, options, logits.dtype
        self.layout = logits.stride(), teacher_logits.stride(), labels.stride()

    def for_layout(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Plan:
        """This plan, or one for tensors that lie in another way, as what was saved for the backward pass may."""
        if self.layout == (logits.stride(), teacher_logits.stride(), labels.stride()):
            return self
        return type(self)(self.kernel, logits, teacher_logits, labels, self.options)

    def forward(self, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss, ce, ela and sta [4]; and if asked for the gradient [T, B, K] in gradient_dtype."""
        return self.kernel.forward(logits, teacher_logits, labels, **self.options._asdict())

    def scaled(self, grad: Tensor, factor: Tensor) -> Tensor:
        """The gradient times a scalar tensor, in the dtype of the logits; perhaps in its own memory."""
        return self.kernel.scaled(grad, factor, self.dtype)
