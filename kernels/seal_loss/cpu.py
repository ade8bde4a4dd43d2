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
            for name in ("logits", "teacher", "labels", "parts", "grad", "weights", "confidence", "samples")
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
    _launch(
        logits,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        objective=OBJECTIVES.index(objective),
        wide_labels=labels.dtype == torch.int64,
        teacher=teacher_logits.to(dtype).contiguous(),
        labels=labels.contiguous(),
        parts=parts,
        grad=grad,
        samples=torch.empty(3, logits.shape[1], dtype=torch.float64),
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
    _launch(logits, temperature=1.0, weights=outputs[0], confidence=outputs[1])
    return outputs


def _launch(logits: Tensor, **values: Tensor | float | None) -> None:
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    T, B, K = logits.shape
    pointers = {name: value.data_ptr() for name, value in values.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    arguments = _Arguments(
        logits=logits.data_ptr(),
        T=T,
        B=B,
        K=K,
        stride_t=logits.stride(0),
        stride_b=logits.stride(1),
        dtype=DTYPES[logits.dtype],
        threads=torch.get_num_threads(),
        **pointers,
        **numbers,
    )
    run("seal_loss", arguments)
