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

from ..launch.cupy import ACCESS, counter, launch, shared_memory, specialised
from .reference import IGNORED

SOURCE = Path(__file__).with_name("cuda.cu")
OBJECTIVES = ("seal", "kd", "tdkd", "weights")  # as in cuda.cu
KEPT = ("nothing", "table", "sample")  # in shared memory; as in cuda.cu
WARPS = 16  # of a block, at most, as in sums.cuh
UNROLLED = 16  # time steps that a kernel is specialised for, at most
ROW = 1024  # logits that one warp goes through before a row gets more warps
COUNTED = 4096  # samples whose labels every block counts for itself, at most
SCALE_THREADS, SCALE_BLOCKS = 256, 1024
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
    """Loss, ce, ela and sta as float32 [4]; if asked for, the gradient [T, B, K] of the loss in the logits' dtype.

    A label that is neither a class nor -100 makes the loss NaN.
    """
    T, B, K = logits.shape
    device = logits.device
    parts, partials = (torch.empty(size, dtype=torch.float32, device=device) for size in (4, 3 * B))
    grad = torch.empty(T, B, K, dtype=logits.dtype, device=device) if gradient else None
    # Blocks that all count all labels would read B² of them.
    counted = None if B <= COUNTED else (labels != IGNORED).sum()
    _launch(
        objective,
        logits,
        (teacher_logits, labels, counted, grad, partials, counter(device), parts, None, None),
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


def scale_(grad: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous gradient by a float32 number on its device; where that is 1, nothing is written."""
    size = grad.numel()
    vector = ACCESS // grad.element_size()
    if size % vector or grad.data_ptr() % ACCESS:
        vector = 1
    blocks = min(-(-size // (vector * SCALE_THREADS)), SCALE_BLOCKS)
    if size:
        kernel = specialised("scale", NUMBERS[grad.dtype], vector)
        arguments = (grad, factor, size)
        launch(SOURCE, kernel, blocks, SCALE_THREADS, arguments, real=torch.float32, device=grad.device)


def _launch(objective, logits, tensors, *, numbers, keep):
    T, B, K = logits.shape
    teacher_logits, labels, _, grad, *_ = tensors
    if teacher_logits is None:
        dtypes = (logits.dtype, torch.float32, torch.int64)
        vector, strides = _vector(logits), (0, 0, 0)
    else:
        dtypes = (logits.dtype, teacher_logits.dtype, labels.dtype)
        vector = math.gcd(_vector(logits), _vector(teacher_logits))
        strides = (*teacher_logits.stride(), labels.stride(0))
    gradient, most = grad is not None, shared_memory(logits.device)
    kernel = _kernel(T, K, dtypes, vector, objective, gradient, most, keep)
    workspace = None
    if kernel.workspace:
        workspace = torch.empty(B * kernel.workspace, dtype=torch.float32, device=logits.device)
    launch(
        SOURCE,
        kernel.expression,
        B,
        kernel.threads,
        (logits, *tensors, workspace, T, B, K, *logits.stride(), *strides, *map(float, numbers), math.log(K)),
        real=torch.float32,
        device=logits.device,
        shared_bytes=kernel.shared_bytes,
    )


def _vector(tensor: Tensor) -> int:
    """How many numbers, at most 8, an access may move: rows of classes are dense, and begin at a multiple of it."""
    *strides, dense = tensor.stride()
    if dense != 1:
        return 1
    size, K = tensor.element_size(), tensor.shape[-1]
    apart = [stride for stride, length in zip(strides, tensor.shape, strict=False) if length > 1]
    return math.gcd(8, K, tensor.data_ptr() // size, *apart)


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
        *(kept, OBJECTIVES.index(objective), gradient),
    )
    workspace = 0 if kept else table // 4
    return _Kernel(specialised("seal_loss", *template), 32 * members * teams, shared[kept], workspace)


def _padded(size: int) -> int:
    return -(-size // ACCESS) * ACCESS
