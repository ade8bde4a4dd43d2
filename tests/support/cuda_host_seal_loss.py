"""Runs of the distillation loss's CUDA kernels on the CPU beside the float64 reference: random inputs, every layout."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import pytest
import torch

from seal_fast.kernels.seal_loss import cupy as room
from seal_fast.kernels.seal_loss import reference

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
OBJECTIVES = ("seal", "kd", "tdkd")
PUBLISHED = {"alpha": 0.6, "beta": 0.15, "temperature": 3.0}
MARGIN = 4096  # numbers before and after each output, which no kernel may write
HALF_UNIT = {F32: 0.0, F16: 2.0**-11, BF16: 2.0**-8}  # of a number's last place, relative to the number
LEAST = {F32: 0.0, F16: 2.0**-25, BF16: 0.0}  # half a unit of the smallest numbers

LAYOUTS = {  # each holds the numbers of a contiguous tensor in other places
    "contiguous": lambda x: x.contiguous(),
    "batch first": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "classes outermost": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other class": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "not aligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "rows apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}


@dataclass(frozen=True)
class Setup:
    """What a kernel is specialised for, and so compiled anew."""

    T: int
    K: int
    objective: str
    keep: str | None
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    label_dtype: torch.dtype
    layout: str

    def __str__(self):
        kept = self.keep or "as much as fits"
        return f"{self.objective}, T={self.T}, K={self.K}, {str(self.dtype)[6:]} {self.layout}, {kept} on chip"


def setups() -> list[Setup]:
    """Each size with its sample on the chip and off it; all else in turn."""
    sizes = [(1, 2), (1, 1000), (1, 4101), (2, 3), (2, 2049), (4, 10), (4, 100), (4, 1000), (4, 4104)]
    sizes += [(10, 10), (10, 100), (10, 2), (33, 100), (33, 1000), (64, 10), (64, 3)]
    turns = [cycle(values) for values in (OBJECTIVES, (F32, BF16, F32, F16, F32), (F32, F32, BF16, F64, F16))]
    turns += [cycle(values) for values in ((torch.int64, torch.int64, torch.int32), ("contiguous", *LAYOUTS))]
    chosen = []
    for T, K in sizes:
        for keep in (None, "table"):
            objective, *rest = (next(turn) for turn in turns)
            chosen.append(Setup(T, K, objective, keep, *rest))
        if chosen[-1].objective != "seal" and chosen[-2].objective != "seal":
            chosen.append(Setup(T, K, "seal", *(getattr(chosen[-1], name) for name in list(Setup.__annotations__)[3:])))
    return chosen


def inputs(T, B, K, seed=0, scale=2.0):
    """Float32 logits, teacher logits and labels: the first step of the first sample is right, the second is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits, teacher_logits = (torch.randn(*shape, K, generator=generator) * scale for shape in ((T, B), (B,)))
    labels = torch.randint(0, K, (B,), generator=generator)
    logits[0, 0, labels[0]] = 5 * scale
    labels[1:2] = reference.IGNORED
    return logits, teacher_logits, labels


def given(setup: Setup, B=3, seed=0, **options):
    logits, teacher_logits, labels = inputs(setup.T, B, setup.K, seed, **options)
    logits, teacher_logits = logits.to(setup.dtype), teacher_logits.to(setup.teacher_dtype)
    layout = LAYOUTS[setup.layout]
    return layout(logits), layout(teacher_logits), labels.to(setup.label_dtype).repeat_interleave(2)[::2]


def expected(logits, teacher_logits, labels, **options):
    """Parts [4] and gradient [T, B, K] of the reference in float64."""
    leaf = logits.double().requires_grad_()
    parts = reference.seal_loss(leaf, teacher_logits.double(), labels, **options)
    (gradient,) = torch.autograd.grad(parts[0], leaf)
    return torch.stack([part.detach() for part in parts]), gradient


def guarded(function, *arguments, **options):
    """Call it; every tensor that it makes must be written all over, unless it is an int, and not beyond."""
    buffers, empty = [], torch.empty

    def within_margins(*shape, dtype, device):
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        buffer = empty(shape.numel() + 2 * MARGIN, dtype=dtype, device=device).fill_(torch.nan)
        buffers.append(buffer)
        return buffer[MARGIN : MARGIN + shape.numel()].view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", within_margins)
        result = function(*arguments, **options)
    for buffer in buffers:
        assert buffer[:MARGIN].isnan().all()
        assert buffer[-MARGIN:].isnan().all()
    return result


def run(logits, teacher_logits, labels, *, gradient=True, keep=None, **options):
    return guarded(room.forward, logits, teacher_logits, labels, gradient=gradient, keep=keep, **options)


def errors(got, right) -> tuple[float, float]:
    """Of the parts, relative where they are above 1; of the gradient besides its rounding, to its largest entry."""
    parts = ((got[0].double() - right[0]).abs() / right[0].abs().clamp_min(1.0)).amax().item()
    dtype, largest = got[1].dtype, right[1].abs().amax().item()
    rounding = right[1].abs() * HALF_UNIT[dtype] * (1 + 1e-4) + LEAST[dtype]
    beyond = ((got[1].double() - right[1]).abs() - rounding).clamp_min(0.0).amax().item()
    assert not got[1].isnan().any()
    return parts, beyond / largest
