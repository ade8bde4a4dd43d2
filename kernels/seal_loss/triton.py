r"""One Triton kernel for the selective-alignment loss, its ancestors, their gradient, and the weights alone.

The method is arXiv 2605.14252, tdkd arXiv 2501.15925; reference.py is the meaning. With its symbols, for each time step

    CE  = m - z_y + ln Z_1                                         Z_1 = Σ exp(z - m),  Z_κ = Σ exp((z - m)/κ)
    ELA = κ Σ e_q ((q' - m_q) - (s - m_s)) / Z_q + κ² ln(Z_s/Z_q)        e_q = exp((q' - m_q)/κ),  Z_q = Σ e_q
    STA = κ Σ e_ẑ ((ẑ - m_ẑ) - (z - m)) / Z_ẑ + κ² ln(Z_κ/Z_ẑ)           e_ẑ = exp((ẑ - m_ẑ)/κ),  Z_ẑ = Σ e_ẑ
    ∂L/∂z = [softmax z - 1_y + ακ (softmax s/κ - softmax q'/κ) + βκ (softmax z/κ - softmax ẑ/κ)] / (T · valid samples)

where on erroneous steps the middle term is 0 at w and twice its value at y, as s_w = s_y and q'_w = q'_y. Every m is
the maximum of its own row, s and q' after the replacement; nothing is subtracted from a sum. The scores of the
alignment lie in [-1, 1], so their softmax needs no maximum.

A program takes a sample at a time. A sample that fits into a chunk stays in registers and is read once: up to K = 1,024
for T = 4, K = 4,096 for T = 1, K = 128 for T = 10. A larger one is read in chunks of classes, in six sweeps, the last
of which writes the gradient: sums wait for maxima, and the confidence for a sum.

The program that finishes last adds up what all of them have left, always in the same order; see triton_sums.py.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.counters import counters
from ..launch.triton import ACCESS, Launch, aligned, size
from . import reference
from .triton_chunk import (
    add_similarities,
    alignment,
    divergence_sums,
    label_gradient,
    linear,
    load_chunk,
    load_row,
    replace,
    temporal_target,
    weighed,
)
from .triton_sums import IGNORED, count_kept, finish

# Most elements of a chunk: with more, threads spill registers. Chunks of more than four rows have half, as each row of
# a thread takes some twenty registers, and a quarter where a thread, reading single logits, has more of the rows.
TILE = 4096
TOGETHER = 4  # neighbouring logits that a thread reads at once
# Each program counts the samples that are not ignored: with a program for each sample, that would be B² labels.
MOST_PROGRAMS = 1024
LABELS = 4  # that a thread reads at once
SCALED = 4096  # elements that a program of _scale takes

_LOG_EPS = tl.constexpr(reference._LOG_EPS)
_NORM_EPS = tl.constexpr(reference._NORM_EPS)
_LOG2_E = tl.constexpr(math.log2(math.e))

# Triton would compile anew for sizes that are 1 or divisible by 16; see neuron/triton_steps.py.
_BY_VALUE = ["alpha", "beta", "temperature", "log_k", "T", "B", "K", "label_stride"]
_BY_VALUE += ["stride_t", "stride_b", "stride_k", "teacher_stride_b", "teacher_stride_k"]


@triton.jit(do_not_specialize=_BY_VALUE)
def _seal_loss(
    logits,  # [T, B, K]
    teacher_logits,  # [B, K]; this and what follows, up to counter: None where weights are asked for
    labels,  # [B]
    grad,  # [T, B, K] contiguous, or None
    parts,  # [4] float32: loss, ce, ela, sta
    partials,  # [3, programs] float32: room for the programs' sums of ce, ela and sta
    counter,  # int32, 0 before and after
    weights,  # [B, T, T] float32; None, as what follows, where the loss is asked for
    confidences,  # [T, B] float32
    alpha,
    beta,
    temperature,
    log_k,  # ln K
    T,
    B,
    K,
    stride_t,
    stride_b,
    stride_k,
    teacher_stride_b,
    teacher_stride_k,
    label_stride,
    OBJECTIVE: tl.constexpr,
    T_PAD: tl.constexpr,
    BLOCK: tl.constexpr,  # classes of a chunk
    RESIDENT: tl.constexpr,  # whether a chunk is all of a sample, and stays in registers
    ROWS: tl.constexpr,  # whether stride_k and teacher_stride_k are 1
    ALIGNED: tl.constexpr,  # what divides K and, unless ROWS is false, all other strides
    LABELS: tl.constexpr,  # labels that are read at once
):
    tl.static_assert(OBJECTIVE == "seal" or (OBJECTIVE == "kd" or OBJECTIVE == "tdkd"))
    LOSS: tl.constexpr = weights is None
    ALIGNS: tl.constexpr = not LOSS or (OBJECTIVE == "seal" and T_PAD > 1)
    TARGET: tl.constexpr = LOSS and (ALIGNS or OBJECTIVE == "tdkd")
    K = K // ALIGNED * ALIGNED  # multiple_of says nothing of an argument itself
    stride_t, stride_b = size(stride_t, ALIGNED), size(stride_b, ALIGNED)
    stride_k = 1 if ROWS else size(stride_k, 1)
    q_stride = 1 if ROWS else size(teacher_stride_k, 1)
    t, offset = tl.arange(0, T_PAD), tl.arange(0, BLOCK)
    end = BLOCK if RESIDENT else K  # of the sweeps: a loop of one constant turn is none
    soften = _LOG2_E / temperature  # exp(x/κ) = 2^(x · soften)
    zero = tl.zeros([T_PAD], tl.float32)
    lowest = tl.full([T_PAD], float("-inf"), tl.float32)
    steps = 0.0  # that the means are over
    ce_sum, ela_sum, sta_sum = 0.0, 0.0, 0.0

    for sample in range(tl.program_id(0), B, tl.num_programs(0)):
        b = tl.cast(sample, tl.int64)
        z_b = logits + b * stride_b
        tile = load_chunk(None, z_b, t, offset, T, K, stride_t, stride_k) if RESIDENT else None
        if LOSS:
            q_b = teacher_logits + b * size(teacher_stride_b, ALIGNED)
            label = tl.load(labels + b * label_stride)
            # A label out of range is no address: it makes the loss NaN. Cut off to 32 bits it could be a class.
            in_range = (label >= 0) & (label < K)
            label = tl.where(in_range | (label == IGNORED), label, -1).to(tl.int32)
            known = t < tl.where(in_range, T, 0)
            z_y = tl.load(z_b + t * stride_t + label * stride_k, known, other=float("nan")).to(tl.float32)
            q_y = tl.load(q_b + label * q_stride, in_range, other=float("nan")).to(tl.float32)
            if sample < tl.num_programs(0):  # while the first sample's logits are on their way
                steps = (count_kept(labels, B, label_stride, LABELS) * T).to(tl.float32)

        m, w, largest = lowest, tl.zeros([T_PAD], tl.int32), zero
        for begin in range(0, end, BLOCK):
            k = begin + offset
            z = load_chunk(tile, z_b, t, k, T, K, stride_t, stride_k)
            top, index = tl.max(z, 1, return_indices=True)
            w = tl.where(top > m, begin + index, w)
            m = tl.maximum(m, top)
            if ALIGNS:
                largest = tl.maximum(largest, tl.max(tl.abs(linear(z, k, K)), 1))
        # Squares overflow from 2^64 on; the norms that this scales stay above _NORM_EPS.
        scale = tl.where(largest > 2.0**50, 2.0**-80, 1.0)
        if LOSS:
            correct = (w == label) & (t < T)
            replaced = w != label if OBJECTIVE == "seal" else w < 0
            q_w = tl.load(q_b + tl.minimum(w, K - 1) * q_stride, t < T, other=0.0).to(tl.float32)
            agreed = tl.minimum(q_w, q_y, propagate_nan=tl.PropagateNan.ALL)
            w, y = tl.where(replaced, w, -1), tl.where(replaced, label, -1)

        z_1, squares, s_max, q_max = zero, zero, lowest, lowest
        for begin in range(0, end, BLOCK):
            k = begin + offset
            z = load_chunk(tile, z_b, t, k, T, K, stride_t, stride_k)
            z_1 += tl.sum(tl.exp(z - m[:, None]), 1)
            if ALIGNS:
                scaled = linear(z, k, K) * scale[:, None]
                squares += tl.sum(scaled * scaled, 1)
            if LOSS:
                s, q = replace(z, load_row(q_b, k, K, q_stride, float("-inf")), k, w, y, z_y, agreed)
                s_max = tl.maximum(s_max, tl.max(s, 1))
                q_max = tl.maximum(q_max, tl.max(q, 1))
        inverse_1 = 1.0 / z_1
        inverse_norm = scale / tl.maximum(tl.sqrt(squares), _NORM_EPS)

        negative_entropy, z_s, z_q, ela = zero, zero, zero, zero
        similarity = tl.zeros([1, 1] if RESIDENT else [T_PAD, T_PAD], tl.float32)
        for begin in range(0, end, BLOCK):
            k = begin + offset
            z = load_chunk(tile, z_b, t, k, T, K, stride_t, stride_k)
            if ALIGNS:
                p = tl.exp(z - m[:, None]) * inverse_1[:, None]
                negative_entropy += tl.sum(p * tl.log(p + _LOG_EPS), 1)
                if not RESIDENT:
                    similarity = add_similarities(
                        similarity, linear(z, k, K), inverse_norm, z_b, t, k, T, K, stride_t, stride_k
                    )
            if LOSS:
                s, q = replace(z, load_row(q_b, k, K, q_stride, float("-inf")), k, w, y, z_y, agreed)
                z_s += tl.sum(tl.exp2((s - s_max[:, None]) * soften), 1)
                sums, terms = divergence_sums(q, q_max, s, s_max, soften)
                z_q += sums
                ela += terms

        early, ela_weight = None, alpha * temperature
        if RESIDENT and grad is not None:  # here, as it takes fewer registers than what it is made of
            q = load_row(q_b, offset, K, q_stride, float("-inf"))
            early = label_gradient(
                None, tile, q, offset, label, w, y, z_y, agreed, m, z_1, s_max, z_s, q_max, z_q, soften, ela_weight
            )

        confidence = (log_k + negative_entropy) / log_k
        A = None
        if ALIGNS and not RESIDENT:
            A = alignment(similarity, confidence, inverse_norm, t, T)
        if not LOSS:
            j = tl.arange(0, T_PAD)
            tl.store(confidences + t.to(tl.int64) * B + b, confidence, t < T)
            tl.store(weights + (b * T + t)[:, None] * T + j[None, :], A, (t < T)[:, None] & (j < T)[None, :])

        ready, target_max, z_kappa, z_target, sta = None, lowest, zero, zero, zero
        if TARGET:
            if RESIDENT:
                ready = temporal_target(
                    None, tile, m, A, confidence, inverse_norm, correct,
                    z_b, t, offset, T, K, stride_t, stride_k, OBJECTIVE,
                )  # fmt: skip
            for begin in range(0, end, BLOCK):
                k = begin + offset
                z = load_chunk(tile, z_b, t, k, T, K, stride_t, stride_k)
                target = temporal_target(
                    ready, z, m, A, confidence, inverse_norm, correct,
                    z_b, t, k, T, K, stride_t, stride_k, OBJECTIVE,
                )  # fmt: skip
                target_max = tl.maximum(target_max, tl.max(target, 1))
            for begin in range(0, end, BLOCK):
                k = begin + offset
                z = load_chunk(tile, z_b, t, k, T, K, stride_t, stride_k)
                target = temporal_target(
                    ready, z, m, A, confidence, inverse_norm, correct,
                    z_b, t, k, T, K, stride_t, stride_k, OBJECTIVE,
                )  # fmt: skip
                z_kappa += tl.sum(tl.exp2((z - m[:, None]) * soften), 1)
                sums, terms = divergence_sums(target, target_max, z, m, soften)
                z_target += sums
                sta += terms

        if LOSS:
            counts = t < tl.where(label == IGNORED, 0, T)
            square = temperature * temperature
            ce_sum += tl.sum(tl.where(counts, (m - z_y) + tl.log(z_1), 0.0), 0)
            ela = temperature * (ela / z_q) + square * (tl.log(z_s) - tl.log(z_q))
            ela_sum += tl.sum(tl.where(counts, ela, 0.0), 0)
            if TARGET:
                sta = temperature * (sta / z_target) + square * (tl.log(z_kappa) - tl.log(z_target))
                sta_sum += tl.sum(tl.where(counts, sta, 0.0), 0)
        if grad is not None:
            inverse_kappa, inverse_target, inverse_steps = 1.0 / z_kappa, 1.0 / z_target, 1.0 / steps
            grad_b = grad + (t.to(tl.int64) * B + b)[:, None] * K
            for begin in range(0, end, BLOCK):
                k = begin + offset
                z = load_chunk(tile, z_b, t, k, T, K, stride_t, stride_k)
                q = load_row(q_b, k, K, q_stride, float("-inf"))
                g = label_gradient(
                    early, z, q, k, label, w, y, z_y, agreed, m, z_1, s_max, z_s, q_max, z_q, soften, ela_weight
                )
                if TARGET:
                    target = temporal_target(
                        ready, z, m, A, confidence, inverse_norm, correct,
                        z_b, t, k, T, K, stride_t, stride_k, OBJECTIVE,
                    )  # fmt: skip
                    e = tl.exp2((z - m[:, None]) * soften) * inverse_kappa[:, None]
                    e -= tl.exp2((target - target_max[:, None]) * soften) * inverse_target[:, None]
                    g += weighed(beta * temperature, e)
                g = tl.where(label == IGNORED, 0.0, g * inverse_steps)
                tl.store(grad_b + k[None, :], g.to(grad.dtype.element_ty), (t < T)[:, None] & (k < K)[None, :])
    if LOSS:
        finish(partials, parts, counter, ce_sum, ela_sum, sta_sum, steps, alpha, beta, TARGET, LABELS)


@triton.jit(do_not_specialize=["N"])
def _scale(values, factor, N, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        _multiply(values, values, by, N, ALIGNED, BLOCK)


@triton.jit(do_not_specialize=["N"])
def _narrow(values, narrow, factor, N, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    _multiply(values, narrow, tl.load(factor).to(tl.float32), N, ALIGNED, BLOCK)


@triton.jit
def _multiply(values, to, by, N, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    N = size(N, ALIGNED)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + n, n < N, other=0.0).to(tl.float32)
    tl.store(to + n, (value * by).to(to.dtype.element_ty), n < N)


def forward(
    logits: Tensor,  # [T, B, K] float32, bfloat16 or float16
    teacher_logits: Tensor,  # [B, K]
    labels: Tensor,  # [B] int64 or int32
    *,
    alpha: float,
    beta: float,
    temperature: float,
    objective: str,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss, ce, ela and sta as float32 [4]; and the gradient [T, B, K] of the loss to the logits, in gradient_dtype."""
    grad = None
    if gradient:
        dtype = reference.gradient_dtype(logits.dtype)
        grad = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    parts = logits.new_empty(4, dtype=torch.float32)
    partials = logits.new_empty((3, min(logits.shape[1], MOST_PROGRAMS)), dtype=torch.float32)
    tensors = (teacher_logits, labels, grad, parts, partials, counters(logits.device, 1), None, None)
    _launch(logits, tensors, (alpha, beta, temperature), objective)
    return parts, grad


def weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights [B, T, T] of the alignment and the confidence [T, B], in float32."""
    T, B, _ = logits.shape
    aligning = logits.new_empty((B, T, T), dtype=torch.float32)
    confidence = logits.new_empty((T, B), dtype=torch.float32)
    _launch(logits, (None,) * 6 + (aligning, confidence), (0.0, 0.0, 1.0), "seal")
    return aligning, confidence


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous grad in gradient_dtype times a number that its device holds, in the dtype of the logits.

    Where that is grad's own, it is multiplied in place; by 1, without touching it.
    """
    N, together = grad.numel(), ACCESS // dtype.itemsize
    result = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    kernel, tensors = (_scale, (grad, factor)) if result is grad else (_narrow, (grad, result, factor))
    wide = together if N % together == 0 else 1
    launch = Launch(kernel, -(-N // SCALED), (N,), device=grad.device, num_warps=8, ALIGNED=wide, BLOCK=SCALED)
    launch(*tensors)
    return result


def _launch(logits, tensors, numbers, objective):
    teacher_logits, labels, *_ = tensors
    teacher = logits[0] if teacher_logits is None else teacher_logits
    label_stride = None if labels is None else labels.stride(0)
    blocks, sizes, options = _plan(
        *(logits.shape, logits.stride(), logits.dtype, teacher.stride(), teacher.dtype, label_stride),
        *(TILE, LABELS, MOST_PROGRAMS),
    )
    launch = Launch(_seal_loss, blocks, (*numbers, *sizes), device=logits.device, OBJECTIVE=objective, **options)
    launch(logits, *tensors)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    dtype: torch.dtype,
    teacher_strides: tuple[int, int],
    teacher_dtype: torch.dtype,
    label_stride: int | None,  # None where weights are asked for
    tile: int,  # this and what follows are the constants of these names
    labels_at_once: int,
    most_programs: int,
) -> tuple[int, tuple, dict]:
    """Programs of a launch, what follows the temperature in the kernel's arguments, and options."""
    T, B, K = shape
    rows = strides[2] == 1 and teacher_strides[1] == 1
    wide = rows and aligned(dtype, K, *strides[:2]) and aligned(teacher_dtype, K, teacher_strides[0])
    t_pad, k_pad = triton.next_power_of_2(T), triton.next_power_of_2(K)
    tile = tile if t_pad <= 4 else tile // 2 if wide else tile // 4
    block = min(k_pad, max(tile // t_pad, 1))
    num_warps = min(max(t_pad * block // (32 * TOGETHER), 1), 8)
    options = {
        "num_warps": num_warps,
        "maxnreg": 255,  # without a limit, ptxas may spill some to have only 128
        "T_PAD": t_pad,
        "BLOCK": block,
        "RESIDENT": label_stride is not None and block == k_pad,
        "ROWS": rows,
        "ALIGNED": TOGETHER if wide else 1,
        "LABELS": 32 * num_warps * labels_at_once,
    }
    sizes = (math.log(K), *shape, *strides, *teacher_strides, 1 if label_stride is None else label_stride)
    return min(B, most_programs), sizes, options
