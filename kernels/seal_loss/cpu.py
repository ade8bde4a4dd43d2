"""Native CPU kernel of the selective-alignment loss; cpu.cpp says how it goes through memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..launch.cpu import DTYPES, code, run, structure
from ..lif.reference import state_dtype
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
    dtype = state_dtype(logits.dtype)
    parts = torch.empty(4, dtype=dtype, device=logits.device)
    grad = None
    if gradient:
        grad = torch.empty_like(logits, dtype=gradient_dtype(logits.dtype), memory_format=torch.contiguous_format)
    teacher_logits, labels = teacher_logits.to(dtype).contiguous(), labels.contiguous()
    arguments = _launch(
        logits,
        objective,
        teacher=teacher_logits.data_ptr(),
        labels=labels.data_ptr(),
        wide_labels=labels.dtype == torch.int64,
        parts=parts.data_ptr(),
        grad=None if grad is None else grad.data_ptr(),
        alpha=alpha,
        beta=beta,
        temperature=temperature,
    )
    if arguments.outside:
        require_classes(labels, logits.shape[2])
    return parts, grad


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense `grad` in gradient_dtype times a scalar tensor, in the dtype of the logits.

    Where that is grad's own, it is multiplied in place, and neither read nor written if the factor is 1.
    """
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
    _launch(logits, "seal", weights=weights.data_ptr(), confidence=confidence.data_ptr(), temperature=1.0)
    return weights, confidence


def _launch(logits: Tensor, objective: str, **fields: int | float | None) -> ctypes.Structure:
    """Start the kernel on the logits and, of LossArguments, the fields that are named; return all of them."""
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    (T, B, K), (stride_t, stride_b, _) = logits.shape, logits.stride()
    arguments = _Arguments(
        logits=logits.data_ptr(),
        T=T,
        B=B,
        K=K,
        stride_t=stride_t,
        stride_b=stride_b,
        dtype=DTYPES[logits.dtype],
        objective=code("Objective", objective),
        threads=torch.get_num_threads(),
        **fields,
    )
    run("seal_loss", arguments)
    return arguments
