"""Gradients where saved tensors come back in another layout, as from hooks that move them elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seal_fast import seal_loss


def contiguous(tensor: Tensor) -> Tensor:
    """A copy, whatever the layout was."""
    return tensor.clone(memory_format=torch.contiguous_format)


def with_and_without(run: Callable[[], Tensor], gradients: Callable[[Tensor], list]) -> tuple[list, list]:
    """Gradients of what `run` gives where saved tensors came back contiguous, and without hooks."""
    expected = gradients(run())
    with torch.autograd.graph.saved_tensors_hooks(contiguous, contiguous):
        out = run()
    return gradients(out), expected


def gradients_of_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, backend: str) -> tuple[list, list]:
    """As `with_and_without`, of the loss whose three inputs have gaps: its gradient, and the one that is made again."""
    logits = logits.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    teacher_logits, labels = teacher_logits.t().contiguous().t(), labels.repeat_interleave(2)[::2]
    return with_and_without(
        lambda: seal_loss(logits, teacher_logits, labels, alpha=0.6, beta=0.15, backend=backend).loss,
        lambda loss: [torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2)],
    )
