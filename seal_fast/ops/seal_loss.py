"""The selective-alignment distillation loss (SeAl-KD, arXiv 2605.14252)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import resolve
from ..kernels.seal_loss import reference
from ._arguments import require_device, require_float_tensor, require_number, shape

_LOSS = {"torch": reference.seal_loss}
_WEIGHTS = {"torch": reference.selective_alignment_weights}
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
    _require_logits(logits)
    B, K = logits.shape[1:]
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
    parts = _LOSS[resolve(backend, "seal_loss", logits.device)](
        logits, teacher_logits, labels, alpha=alpha, beta=beta, temperature=temperature, objective=objective
    )
    return LossParts(*parts)


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
    return _WEIGHTS[resolve(backend, "selective_alignment_weights", logits.device)](logits)


def _require_logits(logits: torch.Tensor) -> None:
    require_float_tensor("logits", logits, "[T, B, K]")
    if logits.dim() != 3 or logits.shape[0] < 1 or logits.shape[1] < 1 or logits.shape[2] < 2:
        raise ValueError(f"logits must be [T, B, K] with T and B at least 1 and K at least 2; got {shape(logits)}.")


def _require_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    B, K = logits.shape[1:]
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor of class indices [B]; got {type(labels).__name__}.")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32; got {labels.dtype}.")
    require_device("labels", labels, "logits", logits)
    if labels.shape != (B,):
        raise ValueError(f"labels must be [{B}] for logits {shape(logits)}; got {shape(labels)}.")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ((labels < 0) | (labels >= K)) & (labels != reference.IGNORED)
        if outside.any():
            first = labels[outside][0].tolist()
            raise ValueError(f"labels must be in [0, {K}) or {reference.IGNORED} to be ignored; got {first}.")
