"""What is trained: a task takes a batch and returns its losses by name, and logits [T, B, K]."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from seal_fast import seal_loss

# objective -> names of the terms that alpha and beta weigh
TERMS = {"seal": ("ela", "sta"), "kd": ("kd", "none"), "tdkd": ("kd", "kd_correct")}


class Outcome(NamedTuple):
    """The loss, its detached parts by name, and detached logits [T, B, K]."""

    loss: torch.Tensor
    parts: dict[str, torch.Tensor]
    logits: torch.Tensor


class Task:
    """A network in training.

    Attributes:
        network: What is trained.
        parallel: What is called for it in training: itself, or what averages its gradients over the ranks.
        time_steps: T of its logits.
        side_stream: Where a teacher runs beside the network; None for the current stream.
    """

    def __init__(self, network: nn.Module, time_steps: int):
        self.network = self.parallel = network
        self.time_steps = time_steps
        self.side_stream: torch.cuda.Stream | None = None

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the network makes of the inputs."""
        return (self.parallel if self.network.training else self.network)(inputs)

    def unsynchronised(self):
        """A context in which a backward pass keeps its gradients on its own rank."""
        return self.parallel.no_sync() if self.parallel is not self.network else contextlib.nullcontext()


class TeacherTask(Task):
    """Cross-entropy of an ANN, which sees the mean over time of event data."""

    def __init__(self, network: nn.Module):
        super().__init__(network, time_steps=1)

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        """Images [B,C,H,W] or events [T,B,C,H,W] -> logits [1, B, K]."""
        return self.run(as_image(inputs)).unsqueeze(0)

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor) -> Outcome:  # noqa: D102
        logits = self.predict(inputs)
        loss = F.cross_entropy(_exact(logits[0]), labels)
        return Outcome(loss, {"ce": loss.detach()}, logits.detach())


class DistillTask(Task):
    """A spiking student, with the objective that `method` names.

    Args:
        network: The student.
        teacher: The teacher in evaluation mode; None for "ce".
        method: "seal"; its parts alone, "ela" or "sta"; "kd", "tdkd"; or "ce", labels only.
        alpha: Weight of the teacher's term.
        beta: Weight of the temporal term.
        temperature: Of both softened distributions.
        backend: Kernels of the loss.
    """

    def __init__(self, network, teacher, *, method, alpha, beta, temperature, backend):
        super().__init__(network, network.time_steps)
        self.teacher = teacher
        self.options = {
            "alpha": 0.0 if method in ("sta", "ce") else alpha,
            "beta": 0.0 if method in ("ela", "kd", "ce") else beta,
            "objective": method if method in ("kd", "tdkd") else "seal",
            "temperature": temperature,
            "backend": backend,
        }

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        """Images [B,C,H,W] or events [T,B,C,H,W] -> logits [T, B, K]."""
        return self.run(inputs)

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor) -> Outcome:  # noqa: D102
        reference = None if self.teacher is None else self._reference(inputs)
        logits = self.predict(inputs)
        if reference is None:
            reference = torch.zeros_like(logits[0])  # of no weight: alpha and beta are 0
        elif self.side_stream is not None:
            torch.cuda.current_stream(inputs.device).wait_stream(self.side_stream)
        loss, ce, *terms = seal_loss(_exact(logits), reference, labels, **self.options)
        weights = self.options["alpha"], self.options["beta"]
        named = zip(TERMS[self.options["objective"]], terms, weights, strict=True)
        parts = {"ce": ce, **{name: value for name, value, weight in named if weight > 0}}
        return Outcome(loss, parts, logits.detach())

    @torch.no_grad()
    def _reference(self, inputs: torch.Tensor) -> torch.Tensor:
        """The teacher's logits [B, K].

        On the side stream they need no `record_stream`: nothing allocates there before it has waited for the current
        stream again, at the next step, when the last use of these logits has been launched.
        """
        if self.side_stream is None:
            return self.teacher(as_image(inputs))
        self.side_stream.wait_stream(torch.cuda.current_stream(inputs.device))
        with torch.cuda.stream(self.side_stream):
            return self.teacher(as_image(inputs))


def _exact(logits: torch.Tensor) -> torch.Tensor:
    """Not in 16 bits, so that the loss's gradient is not rounded to float16 before GradScaler scales it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def as_image(inputs: torch.Tensor) -> torch.Tensor:
    """What a teacher sees: images as they are, events [T,B,C,H,W] as their mean over T."""
    return inputs.mean(0) if inputs.dim() == 5 else inputs


def tau_of(decay: float) -> float:
    """τ = 1/(1 - decay), rounded as in the published neuron: it keeps the decay as a logit in float32.

    Args:
        decay: In [0, 1); 0, which the published neuron does not take, gives τ = 1.

    Raises:
        ValueError: It is not, or rounds to 1.
    """
    lost = 0.0
    if 0 <= decay < 1:
        logit = torch.tensor(math.log(decay / (1 - decay)) if decay else -math.inf, dtype=torch.float32)
        lost = (1.0 - torch.sigmoid(logit)).item()
    if lost == 0:
        raise ValueError(f"decay must be at least 0 and below 1, in float32 too; got {decay}.")
    return 1.0 / lost


def parameter_groups(network: nn.Module, weight_decay: float, *, spiking: bool) -> list[dict]:
    """Parameters with their weight decay: in a student it acts on convolution and linear weights only."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not spiking:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
