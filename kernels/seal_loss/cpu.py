"""Native CPU kernel of the selective-alignment loss; cpu.cpp says how it goes through memory."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..launch.cpu import DTYPES, run
from ..lif.reference import state_dtype

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
        *((name, ctypes.c_int32) for name in ("dtype", "objective", "wide_labels", "threads")),
    )


class _Scaled(ctypes.Structure):
    """As ScaleArguments in cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "factor")),
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
    """Loss, ce, ela and sta [4] in the state's dtype; and the loss's gradient [T, B, K] in the dtype of the logits."""
    dtype = state_dtype(logits.dtype)
    parts = torch.empty(4, dtype=dtype)
    grad = torch.empty(logits.shape, dtype=logits.dtype) if gradient else None
    teacher_logits, labels = teacher_logits.to(dtype).contiguous(), labels.contiguous()
    _launch(
        logits,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        objective=OBJECTIVES.index(objective),
        wide_labels=labels.dtype == torch.int64,
        teacher=teacher_logits.data_ptr(),
        labels=labels.data_ptr(),
        parts=parts.data_ptr(),
        grad=None if grad is None else grad.data_ptr(),
    )
    return parts, grad


def scale_(grad: Tensor, factor: Tensor) -> None:
    """Multiply a dense `grad` in place by a scalar tensor; nothing is read or written if that is 1."""
    factor = factor.to(state_dtype(grad.dtype))
    arguments = _Scaled(grad.data_ptr(), factor.data_ptr(), grad.numel(), DTYPES[grad.dtype])
    run("seal_scale", arguments)


def weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, T, T] of the other steps in each step's target, and confidence [T, B]."""
    T, B, _ = logits.shape
    dtype = state_dtype(logits.dtype)
    outputs = torch.empty(B, T, T, dtype=dtype), torch.empty(T, B, dtype=dtype)
    pointers = {"weights": outputs[0].data_ptr(), "confidence": outputs[1].data_ptr()}
    _launch(logits, temperature=1.0, **pointers)
    return outputs


def _launch(logits: Tensor, **values: float | None) -> None:
    """Start the kernel with these of its arguments, tensors as pointers."""
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    (T, B, K), (stride_t, stride_b, _) = logits.shape, logits.stride()
    pointer, dtype, threads = logits.data_ptr(), DTYPES[logits.dtype], torch.get_num_threads()
    strides = {"stride_t": stride_t, "stride_b": stride_b}
    run("seal_loss", _Arguments(logits=pointer, T=T, B=B, K=K, dtype=dtype, threads=threads, **strides, **values))
