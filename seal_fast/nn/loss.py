"""The distillation loss as a module."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from ..backends import check_name, shown
from ..ops._arguments import require_integer, require_number, shape
from ..ops.seal_loss import OBJECTIVES, LossParts


class SealLoss(nn.Module):
    """Selective-alignment distillation (SeAl-KD, arXiv 2605.14252) for any spiking student and any teacher.

    Args:
        alpha: Weight of the error-aware logit alignment, at least 0.
        beta: Weight of the selective temporal alignment, at least 0.
        temperature: Softens both distributions; above 0.
        objective: "seal", or its ancestors "kd" and "tdkd", as in the operator `seal_loss`.
        time_steps: T, for a student whose logits are [T·B, K] with T outermost; None for one that gives [T, B, K].
        backend: "auto", "triton", "cupy", "cpu" or "torch".

    Raises:
        TypeError, ValueError: As the operator `seal_loss`; also where [T·B, K] logits do not divide into time_steps.
    """

    def __init__(
        self,
        alpha: float = 0.6,
        beta: float = 0.15,
        temperature: float = 3.0,
        objective: str = "seal",
        time_steps: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.alpha = require_number("alpha", alpha, at_least=0.0)
        self.beta = require_number("beta", beta, at_least=0.0)
        self.temperature = require_number("temperature", temperature, above=0.0)
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {objective!r}.")
        self.objective = objective
        self.time_steps = None if time_steps is None else require_integer("time_steps", time_steps, 1)
        self.backend = check_name(backend)

    def forward(self, logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> LossParts:
        """Loss, and detached ce, ela and sta, of logits [T, B, K] or [T·B, K], teacher_logits [B, K] and labels [B]."""
        if isinstance(logits, torch.Tensor) and logits.dim() == 2:
            if self.time_steps is None or logits.shape[0] % self.time_steps:
                raise ValueError(
                    "logits must be [T, B, K], or [T·B, K] where time_steps was given and divides their rows; "
                    f"got {shape(logits)} with time_steps={self.time_steps}."
                )
            logits = logits.unflatten(0, (self.time_steps, -1))
        return ops.seal_loss(
            logits,
            teacher_logits,
            labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            objective=self.objective,
            backend=self.backend,
        )

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"alpha={self.alpha:g}, beta={self.beta:g}, temperature={self.temperature:g}, objective={self.objective}, "
            f"time_steps={self.time_steps}, backend={shown(self.backend, 'seal_loss')}"
        )
