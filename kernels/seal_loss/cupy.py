"""CUDA C++ kernels of the distillation loss: one launch for the loss and its gradient; cuda.cu says how.

A sample's T·K logits, in their dtype, and its teacher's K in float32 stay in the GPU's shared memory where they fit,
next to 1.3 KB + T·(64 + 4·T) bytes of the kernel's own. In the 227 KB that an H200 gives a block, this is up to

    T = 4     K = 11,500 in float32, 19,200 in 16 bits
    T = 10    K = 5,200 in float32, 9,500 in 16 bits
    T = 64    K = 800 in float32, 1,590 in 16 bits

Larger samples are swept where they are: once for maxima, sums and similarities, after that out of the L2 cache if it
holds the samples in flight, for confidence and ELA, for STA, and for the gradient. Where the kernel's own bytes do not
fit either, beyond T = 232 there, it keeps them in a workspace in global memory instead, B·T·(64 + 4·T) bytes.

Beyond 4,096 samples torch counts the labels that are not ignored, in launches of its own.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..launch.counters import counters
from ..launch.cupy import ACCESS, Launch, enumerator, shared_memory, specialised
from .reference import IGNORED, gradient_dtype

SOURCE = Path(__file__).with_name("cuda.cu")
KEPT = ("nothing", "table", "sample")  # in shared memory, from least to most
WARPS = 16  # of a block, at most, as in sums.cuh
UNROLLED = 16  # time steps that a kernel is specialised for, at most
ROW = 1024  # logits that one warp goes through before a row gets more warps
COUNTED = 4096  # samples whose labels every block counts for itself, at most
SCALE_THREADS, SCALE_BLOCKS = 256, 1024
_MOST_NEIGHBOURS = 8  # numbers, of at most 8 bytes, that one access moves
NUMBERS = {
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "double",  # the teacher's alone
    torch.int64: "int64_t",
    torch.int32: "int",
}


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
    keep: str | None = None,  # what of a sample is kept in shared memory, of KEPT; None: as much as fits
) -> tuple[Tensor, Tensor | None]:
    """Loss, ce, ela and sta as float32 [4]; if asked for, the gradient [T, B, K] of the loss in gradient_dtype.

    A label that is neither a class nor -100 makes the loss NaN.
    """
    B, device = logits.shape[1], logits.device
    parts = torch.empty(4, dtype=torch.float32, device=device)
    partials = torch.empty(3 * B, dtype=torch.float32, device=device)
    grad = None
    if gradient:
        grad = torch.empty_like(logits, dtype=gradient_dtype(logits.dtype), memory_format=torch.contiguous_format)
    # Blocks that all count all labels would read B² of them.
    counted = None if B <= COUNTED else (labels != IGNORED).sum()
    _launch(
        objective,
        logits,
        (teacher_logits, labels, counted, grad, partials, counters(device, 1), parts, None, None),
        numbers=(alpha, beta, temperature),
        keep=keep,
    )
    return parts, grad


def weights(logits: Tensor, *, keep: str | None = None) -> tuple[Tensor, Tensor]:
    """Weights [B, T, T] and confidence [T, B] of the time steps of logits [T, B, K], in float32."""
    T, B, _ = logits.shape
    weights = torch.empty(B, T, T, dtype=torch.float32, device=logits.device)
    confidence = torch.empty(T, B, dtype=torch.float32, device=logits.device)
    _launch("weights", logits, (*(None,) * 7, weights, confidence), numbers=(0.0, 0.0, 1.0), keep=keep)
    return weights, confidence


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous gradient in gradient_dtype times a float32 number on its device, in the dtype of the logits.

    Where that is grad's own, it is multiplied in place, and not written if the factor is 1.
    """
    size, in_place = grad.numel(), grad.dtype == dtype
    result = grad if in_place else torch.empty_like(grad, dtype=dtype)
    if size:
        kernel, blocks = _scaling(size, dtype, grad.data_ptr() % ACCESS == 0, in_place)
        launch = Launch(SOURCE, kernel, blocks, SCALE_THREADS, (size,), real=torch.float32, device=grad.device)
        launch(grad, *([] if in_place else [result]), factor)
    return result


@functools.lru_cache(maxsize=1024)
def _scaling(size: int, dtype: torch.dtype, aligned: bool, in_place: bool) -> tuple[str, int]:
    """The specialisation of `scale` or `narrow`, for a result in `dtype`, and its blocks."""
    vector = ACCESS // dtype.itemsize
    if size % vector or not aligned:
        vector = 1
    name = "scale" if in_place else "narrow"
    return specialised(name, NUMBERS[dtype], vector), min(-(-size // (vector * SCALE_THREADS)), SCALE_BLOCKS)


def _launch(objective, logits, tensors, *, numbers, keep):
    teacher_logits, labels, _, grad, *_ = tensors
    others = (None, None) if teacher_logits is None else (_layout(teacher_logits), (labels.stride(0), labels.dtype))
    most = shared_memory(logits.device)
    kernel, sizes = _plan(_layout(logits), *others, objective, grad is not None, most, keep)
    workspace = None
    if kernel.workspace:
        B = logits.shape[1]
        workspace = torch.empty(B * kernel.workspace, dtype=torch.float32, device=logits.device)
    alpha, beta, temperature = numbers
    launch = Launch(
        SOURCE,
        kernel.expression,
        logits.shape[1],
        kernel.threads,
        (*sizes, float(alpha), float(beta), float(temperature), math.log(logits.shape[2])),
        real=torch.float32,
        device=logits.device,
        shared_bytes=kernel.shared_bytes,
    )
    launch(logits, *tensors, workspace)


def _layout(tensor: Tensor) -> tuple:
    """All that the choice of a kernel looks at: shape, strides, dtype, and where the first number lies in 64 bytes."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % (_MOST_NEIGHBOURS * 8)


@functools.lru_cache(maxsize=1024)
def _plan(logits, teacher_logits, labels, objective, gradient, most, keep) -> tuple[_Kernel, tuple[int, ...]]:
    """The kernel, and its sizes and strides; of the layouts of logits and teacher_logits, and of stride and dtype."""
    shape, strides, dtype, _ = logits
    if teacher_logits is None:
        dtypes = (dtype, torch.float32, torch.int64)
        vector, other_strides = _vector(*logits), (0, 0, 0)
    else:
        dtypes = (dtype, teacher_logits[2], labels[1])
        vector = math.gcd(_vector(*logits), _vector(*teacher_logits))
        other_strides = (*teacher_logits[1], labels[0])
    T, _, K = shape
    kernel = _kernel(T, K, dtypes, vector, objective, gradient, most, keep)
    return kernel, (*shape, *strides, *other_strides)


def _vector(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, address: int) -> int:
    """How many numbers, at most 8, an access may move: rows of classes are dense, and begin at a multiple of it."""
    *strides, dense = strides
    if dense != 1:
        return 1
    apart = [stride for stride, length in zip(strides, shape, strict=False) if length > 1]
    return math.gcd(_MOST_NEIGHBOURS, shape[-1], address // dtype.itemsize, *apart)


class _Kernel(NamedTuple):
    """A specialisation of the kernel, and what its launch takes."""

    expression: str  # its name in C++
    threads: int  # of a block
    shared_bytes: int  # of a block
    workspace: int  # float32 elements of a sample


@functools.lru_cache(maxsize=1024)
def _kernel(
    T: int,
    K: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],  # of logits, teacher_logits and labels
    vector: int,
    objective: str,
    gradient: bool,
    most: int,  # bytes of shared memory that a block may have
    keep: str | None,
) -> _Kernel:
    members = 1  # warps of a team
    while 2 * members * T <= WARPS and ROW * members < K:
        members *= 2
    teams = -(-T // -(-T // WARPS))
    size = dtypes[0].itemsize
    board, table = WARPS * (2 * 32 + 16), T * 64 + _padded(4 * T * T)
    sample = T * _padded(K * size) + (_padded(4 * K) if objective != "weights" else 0)
    shared = (board, board + table, board + table + sample)  # bytes, by KEPT
    kept = KEPT.index(keep) if keep else max(i for i, needed in enumerate(shared) if i == 0 or needed <= most)
    template = (
        *(NUMBERS[dtype] for dtype in dtypes),
        *(min(vector, ACCESS // size), members, T if T <= UNROLLED else 0),
        *(enumerator(SOURCE, "Kept", KEPT[kept]), enumerator(SOURCE, "Objective", objective), gradient),
    )
    workspace = 0 if kept else table // 4
    return _Kernel(specialised("seal_loss", *template), 32 * members * teams, shared[kept], workspace)


def _padded(size: int) -> int:
    return -(-size // ACCESS) * ACCESS
