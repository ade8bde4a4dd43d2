"""Native CPU kernel of the selective-alignment loss; cpu.cpp says how it goes through memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..launch.cpu import DTYPES, run
from ..lif.reference import state_dtype
from .reference import gradient_dtype, require_classes

OBJECTIVES = ("seal", "kd", "tdkd")  # in the order of cpu.cpp


class _Arguments(ctypes.Structure):
    """As LossArguments in cpu.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("logits", "teacher", "labels", "parts", "grad", "weights", "confidence")
        ),
        *((name, ctypes.c_int64) for name in ("T", "B", "K", "stride_t", "stride_b")),
        *((name, ctypes.c_double) for name in ("alpha", "beta", "temperature")),
        *((name, ctypes.c_int32) for name in ("dtype", "objective", "wide_labels", "threads", "outside")),
    )


class _Scaled(ctypes.Structure):
    """As ScaleArguments in cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "wide", "factor")),
        ("count", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


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
    parts = torch.empty(4, dtype=dtype)
    grad = None
    if gradient:
        grad = torch.empty_like(logits, dtype=gradient_dtype(logits.dtype), memory_format=torch.contiguous_format)
    teacher_logits, labels = teacher_logits.to(dtype).contiguous(), labels.contiguous()
    read = (teacher_logits.data_ptr(), labels.data_ptr())
    written = (parts.data_ptr(), None if grad is None else grad.data_ptr(), None, None)
    numbers = (alpha, beta, temperature)
    switches = (OBJECTIVES.index(objective), labels.dtype == torch.int64)
    if _launch(logits, (*read, *written), numbers, switches).outside:
        require_classes(labels, logits.shape[2])
    return parts, grad


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A dense `grad` in gradient_dtype times a scalar tensor, in the dtype of the logits.

    Where that is grad's own, it is multiplied in place, and neither read nor written if the factor is 1.
    """
    result = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    factor, wide = factor.to(state_dtype(dtype)), None if result is grad else grad.data_ptr()
    run("seal_scale", _Scaled(result.data_ptr(), wide, factor.data_ptr(), grad.numel(), DTYPES[dtype]))
    return result


def weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, T, T] of the other steps in each step's target, and confidence [T, B]."""
    T, B, _ = logits.shape
    dtype = state_dtype(logits.dtype)
    outputs = torch.empty(B, T, T, dtype=dtype), torch.empty(T, B, dtype=dtype)
    _launch(logits, (None,) * 4 + tuple(output.data_ptr() for output in outputs), (0.0, 0.0, 1.0), (0, False))
    return outputs


def _launch(logits: Tensor, pointers: tuple, numbers: tuple, switches: tuple) -> _Arguments:
    """Start the kernel; the arguments after those of the logits, the sizes and dtype are in the structure's order."""
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    sizes, dtype = (*logits.shape, *logits.stride()[:2]), DTYPES[logits.dtype]
    arguments = _Arguments(logits.data_ptr(), *pointers, *sizes, *numbers, dtype, *switches, torch.get_num_threads())
    run("seal_loss", arguments)
    return arguments
