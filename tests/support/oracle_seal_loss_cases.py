"""One run of seal_loss and selective_alignment_weights beside the oracle, by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

import oracle_seal_loss
from oracle import Gradient
from oracle_cases import BF16, F16, F32, F64, Draw, array, off, require, state_of
from seal_fast import seal_loss, selective_alignment_weights

STEPS = [1, 1, 2, 3, 4, 4, 10, 16, 17, 33]
CLASSES = [2, 3, 7, 8, 10, 16, 17, 100, 511, 513]


@dataclass
class Case:
    """The arguments of one call, and what flows back into the loss."""

    logits: torch.Tensor  # [T, B, K]
    teacher_logits: torch.Tensor  # [B, K]
    labels: torch.Tensor  # [B]
    options: dict
    upstream: float
    kind: str

    def __str__(self):
        z, q = self.logits, self.teacher_logits
        shapes = f"{list(z.shape)} {z.dtype} {z.stride()}, teacher {q.dtype} {q.stride()}"
        return f"{self.kind} logits {shapes}, labels {self.labels.tolist()}, {self.options}, upstream {self.upstream}"


def case_of(seed: int, steps=STEPS, classes=CLASSES, dtypes=(F32, F32, F32, F64, F16, BF16), largest=1e30) -> Case:
    draw = Draw(seed)
    dtype, T, K, B = draw.of(dtypes), draw.of(steps), draw.of(classes), draw.of([1, 2, 3, 5])
    options = {
        "alpha": draw.of([0.0, 0.6, 0.6, 1.0, 2.5]),
        "beta": draw.of([0.0, 0.15, 0.15, 1.0]),
        "temperature": draw.of([3.0, 3.0, 3.0, 1.0, 0.5, 4.0, 20.0]),
        "objective": draw.of(["seal", "seal", "seal", "kd", "tdkd"]),
    }
    kind = draw.of(
        ["normal", "normal", "normal", "small", "tiny", "wide", "huge", "far", "ties", "zeros", "masked", "nan"]
    )
    scale = {"small": 0.05, "tiny": draw.of([1e-30, 1e-20, 1e-12]), "wide": 30.0}.get(kind, 2.0)
    if kind == "huge":
        scale = 1e4 if dtype == F16 else largest
    z, q = (draw.normal((*shape, K), F64, scale, 50.0 if kind == "far" else 0.0) for shape in ((T, B), (B,)))
    labels = torch.from_numpy(draw.random.integers(0, K, B)).to(draw.of([torch.int64, torch.int32]))
    if kind == "ties":
        z, q = z.round(), q.round()
    if kind == "zeros":
        z[draw.random.integers(T)] = 0.0
        q[0] = 0.0
    for t in range(T):  # right time steps, which random ones of many classes seldom are
        for b in range(B):
            if draw.chance(0.4) and kind not in ("ties", "zeros"):
                z[t, b, labels[b]] = z[t, b].max() + abs(scale) * draw.of([0.0, 0.5, 3.0])
    if kind == "masked" and K > 2:  # classes that neither student nor teacher may name
        options["objective"] = "kd"
        masked = (torch.arange(K) > 0) & (torch.arange(K) % 2 == 0)
        z[..., masked] = -math.inf
        if draw.chance(0.3):
            options["alpha"] = 0.0  # ELA is infinite where the teacher names them, and must not spoil the loss
        else:
            q[..., masked] = -math.inf
        labels = torch.where(masked[labels.long()], 0, labels).to(labels.dtype)
    if kind == "nan":
        z[draw.random.integers(T), 0, draw.random.integers(K)] = math.nan
    for b in range(B):
        if draw.chance(0.2):
            labels[b] = -100
    z = draw.laid_out(z.to(dtype))
    q = draw.laid_out(q.to(draw.of([dtype, dtype, F32 if dtype != F64 else F64, BF16])), broadcast=False)
    # A gradient in bfloat16 is rounded before it is scaled, and once more unless by a power of two.
    upstream = draw.of([1.0, 1024.0] if dtype == BF16 else [1.0, 0.3, 1024.0])
    return Case(z, q, labels, options, upstream, kind)


def run(case: Case, backend: str):
    """Parts with and without a gradient, the gradient or None where all samples are ignored, weights, confidence."""
    z, given = case.logits, (case.teacher_logits, case.labels)
    leaf = z.detach().requires_grad_()
    parts = seal_loss(leaf, *given, backend=backend, **case.options)
    without = seal_loss(z.detach(), *given, backend=backend, **case.options)
    gradient = None
    if (case.labels != oracle_seal_loss.IGNORED).any():
        upstream = torch.tensor(case.upstream, dtype=parts.loss.dtype)
        (gradient,) = torch.autograd.grad(parts.loss, leaf, upstream)
    return parts, without, gradient, *selective_alignment_weights(z, backend=backend)


def check(case: Case, backend: str, limit: float, worst: dict | None = None) -> None:
    """Parts, gradient, weights and confidence, off by at most `limit` times what roundoff explains."""
    z, labels, state = case.logits, case.labels, state_of(case.logits.dtype)
    size = z.numel()

    def compare(name, got, value, roundoff):
        ratio = off(got, Gradient(np.asarray(value), np.asarray(roundoff)), state)
        if worst is not None and ratio > worst.get(name, (0.0,))[0]:
            worst[name] = ratio, str(case)
        require(ratio <= limit, f"{name} is off by {ratio:.3g} roundoffs", case, size)

    exact, teacher = array(z), array(case.teacher_logits, state).astype(np.float64)
    right = oracle_seal_loss.seal_loss(exact, teacher, labels.numpy(), **case.options, cancels=backend == "torch")
    parts, without, gradient, got_A, got_confidence = run(case, backend)
    same = all(np.array_equal(array(a), array(b), equal_nan=True) for a, b in zip(parts, without, strict=True))
    require(same, "parts without a gradient differ", case, size)
    require(all(part.dtype == state for part in parts), "dtypes of parts differ", case, size)

    known = ~np.isnan(exact).any((0, 2))  # samples without NaN
    seen = labels.numpy() != oracle_seal_loss.IGNORED
    if seen.any() and known[seen].all():
        for name, got, value, roundoff in zip(parts._fields, parts, right.parts, right.parts_off, strict=True):
            compare(name, got.detach(), value, roundoff)
    else:  # as is the mean of no numbers
        require(parts.loss.isnan().item() and parts.ce.isnan().item(), "the loss hides a NaN", case, size)
    if gradient is not None:
        require(gradient.dtype == z.dtype, "dtype of the gradient differs", case, size)
        compare("gradient", gradient[:, known], *(case.upstream * each[:, known] for each in right[2:]))

    if case.kind == "masked":  # directions of infinite vectors
        return
    with np.errstate(all="ignore"):
        A, confidence, A_off, confidence_off = oracle_seal_loss.weights(exact)
    compare("weights", got_A[known], A[known], A_off[known])
    compare("confidence", got_confidence[:, known], confidence[:, known], confidence_off[:, known])
