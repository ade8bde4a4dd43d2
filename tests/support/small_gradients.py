"""Float16 logits many of whose gradients are 0 in float16 until a GradScaler's factor has been multiplied in."""

from __future__ import annotations

import torch

from seal_fast.kernels.seal_loss import reference

FACTOR = 65536.0  # GradScaler's first one
OBJECTIVES = ("seal", "kd")  # the targets of tdkd are zeros where no step is right: no gradient is small there
PUBLISHED = {"alpha": 0.6, "beta": 0.15, "temperature": 3.0}
HALF_UNIT, LEAST = 2.0**-11, 2.0**-25  # of a float16 number's last place, relative to it, and of the smallest number's
KERNEL = 3e-6  # besides that rounding, relative to the probabilities whose difference an entry is; measured 1e-6


def inputs(T: int = 4, B: int = 8, K: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, B, K], teacher logits [B, K] and labels [B]; all steps and the teacher have much the same logits."""
    generator = torch.Generator().manual_seed(0)
    common = (torch.rand(B, K, generator=generator) - 0.5) * 60
    logits, teacher_logits = (common + torch.randn(*shape, generator=generator) for shape in ((T, B, K), (B, K)))
    labels = torch.randint(0, K, (B,), generator=generator)
    labels[1] = reference.IGNORED
    return logits.half(), teacher_logits.half(), labels


def check(got: torch.Tensor, tensors: tuple, objective: str) -> None:
    """Assert that `got` is the gradient of FACTOR times the loss, rounded to float16 once."""
    logits, teacher_logits, labels = tensors
    leaf = logits.double().requires_grad_()
    loss = reference.seal_loss(leaf, teacher_logits.double(), labels, **PUBLISHED, objective=objective)[0]
    (exact,) = torch.autograd.grad(loss * FACTOR, leaf)
    kept = labels != reference.IGNORED
    exact, got = exact[:, kept], got.cpu()
    assert (exact.abs() < LEAST * FACTOR).double().mean() > 0.2  # would be 0 if they were rounded first
    assert exact.abs().amin() > LEAST
    assert got.dtype == torch.float16
    assert got[:, kept].all()
    assert not got[:, ~kept].any()
    of_label = torch.nn.functional.one_hot(labels[kept], logits.shape[2])
    student, teacher = (torch.softmax(values[..., kept, :].double() / 3, -1) for values in (logits, teacher_logits))
    terms = (student + teacher + of_label) * FACTOR / exact[..., 0].numel()
    error = (got[:, kept].double() - exact).abs() - LEAST - HALF_UNIT * exact.abs()
    assert (error <= KERNEL * terms).all()
