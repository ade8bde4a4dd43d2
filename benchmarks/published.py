"""The distillation step as its publication describes it (arXiv 2605.14252), in plain eager torch and float32.

A static image is repeated T times and passes the stem T times; each neuron is a loop over T of small operations; batch
norm runs on [T·B, C, H, W]; the loss is a loop over T (published_loss.py). Written from the description. The graph is
also the one that controls with other neurons use; names of parameters are those of seal_fast.models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import published_loss


class Fire(torch.autograd.Function):
    """s = 1 where u >= 0, else 0; backward with the derivative of a sigmoid of sharpness 4."""

    @staticmethod
    def forward(ctx, u):  # noqa: D102
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad_spikes):  # noqa: D102
        p = torch.sigmoid(4.0 * ctx.saved_tensors[0])
        return grad_spikes * (4.0 * p * (1.0 - p))


class LoopedLIF(nn.Module):
    """Neurons that start at rest: the input is not divided by tau, threshold 1, hard reset to 0."""

    def __init__(self, tau: float, time_steps: int):
        super().__init__()
        self.tau, self.time_steps = tau, time_steps

    def forward(self, rows: torch.Tensor) -> torch.Tensor:  # noqa: D102
        x = rows.unflatten(0, (self.time_steps, -1))
        v = torch.zeros_like(x[0])
        spikes = []
        for t in range(self.time_steps):
            h = v * (1.0 - 1.0 / self.tau) + x[t]
            s = Fire.apply(h - 1.0)
            v = (1.0 - s) * h
            spikes.append(s)
        return torch.stack(spikes).flatten(0, 1)


def _norm(convolution: nn.Conv2d) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return convolution, nn.BatchNorm2d(convolution.out_channels)


class Block(nn.Module):
    """conv → BN → LIF → conv → BN + shortcut → LIF, on spikes [T·B, C, H, W]."""

    bias = False

    def __init__(self, in_channels: int, channels: int, stride: int, neuron):
        super().__init__()
        self.conv1, self.bn1 = _norm(nn.Conv2d(in_channels, channels, 3, stride, 1, bias=self.bias))
        self.conv2, self.bn2 = _norm(nn.Conv2d(channels, channels, 3, 1, 1, bias=self.bias))
        self.lif1, self.lif2 = neuron(), neuron()
        changes = stride != 1 or in_channels != channels
        layers = _norm(nn.Conv2d(in_channels, channels, 1, stride, bias=self.bias)) if changes else ()
        self.add_shortcut(nn.Sequential(*layers))

    def add_shortcut(self, shortcut: nn.Sequential) -> None:  # noqa: D102
        self.shortcut = shortcut

    def forward(self, spikes: torch.Tensor) -> torch.Tensor:  # noqa: D102
        inner = self.lif1(self.bn1(self.conv1(spikes)))
        return self.lif2(self.bn2(self.conv2(inner)) + self.shortcut(spikes))


class PreActBlock(Block):
    """LIF → conv → BN → LIF → conv → BN + shortcut; the shortcut carries the membrane input [T·B, C, H, W]."""

    bias = True

    def add_shortcut(self, shortcut: nn.Sequential) -> None:  # noqa: D102
        self.downsample = shortcut

    def forward(self, membrane_input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        inner = self.bn1(self.conv1(self.lif1(membrane_input)))
        return self.bn2(self.conv2(self.lif2(inner))) + self.downsample(membrane_input)


# arch -> (block, blocks per stage, channels per stage, hidden neurons of the readout)
ARCHITECTURES = {
    "resnet18": (Block, (2, 2, 2, 2), (64, 128, 256, 512), None),
    "resnet19": (Block, (3, 3, 2), (128, 256, 512), 256),
    "preact_resnet34": (PreActBlock, (3, 4, 6, 3), (64, 128, 256, 512), None),
    "narrow_resnet18": (Block, (2, 2, 2, 2), (8, 8, 8, 8), None),
}


class Student(nn.Module):
    """Images [B, C, H, W] or events [T, B, C, H, W] -> logits [T, B, K].

    Args:
        arch: A key of `ARCHITECTURES`.
        num_classes: K.
        in_channels: C.
        time_steps: T.
        neuron: Makes a layer of neurons, a module from rows [T·B, ...] to spikes [T·B, ...].
        stem_once: Whether a static image passes the stem once, and what comes out is repeated.
    """

    def __init__(
        self,
        arch: str,
        *,
        num_classes: int,
        in_channels: int,
        time_steps: int,
        neuron: Callable[[], nn.Module],
        stem_once: bool = False,
    ):
        super().__init__()
        block, depths, widths, hidden = ARCHITECTURES[arch]
        self.time_steps, self.stem_once = time_steps, stem_once
        if block is PreActBlock:
            self.conv1, self.bn1 = _norm(nn.Conv2d(in_channels, widths[0], 7, 2, 3))
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            self.fc = nn.Linear(widths[-1], num_classes)
            self.stem, self.readout = ("conv1", "bn1", "maxpool"), "fc"
        else:
            self.conv0 = nn.Sequential(*_norm(nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)))
            self.lif0 = neuron()
            sizes = (widths[-1], num_classes) if hidden is None else (widths[-1], hidden, num_classes)
            layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
            self.classifier = nn.Sequential(*layers[:1], *([neuron()] if hidden else []), *layers[1:])
            self.stem, self.readout = ("conv0",), "classifier"
        channels, self.stages = widths[0], []
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for position in range(depth):
                blocks.append(block(channels, width, 2 if index > 1 and position == 0 else 1, neuron))
                channels = width
            self.stages.append(f"layer{index}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        copies = self.time_steps if x.dim() == 4 else 1
        x = x if x.dim() == 4 else x.flatten(0, 1)
        if not self.stem_once:
            x = torch.cat([x] * copies)
        for name in self.stem:
            x = getattr(self, name)(x)
        if self.stem_once:
            x = torch.cat([x] * copies)
        if hasattr(self, "lif0"):
            x = self.lif0(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        logits = getattr(self, self.readout)(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits.unflatten(0, (self.time_steps, -1))


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on the weights of convolution and linear layers only."""
    decayed = [m.weight for m in student.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    chosen = set(map(id, decayed))
    others = [p for p in student.parameters() if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def logits(student: nn.Module, teacher: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the student [T, B, K] and of the teacher [B, K], for inputs as in `Distillation`."""
    events = inputs.dim() == 5
    with torch.no_grad():
        seen = inputs.mean(1) if events else inputs
        teacher_logits = teacher(seen.to(next(teacher.parameters()).dtype))
    return student(inputs.transpose(0, 1) if events else inputs), teacher_logits


@dataclass
class Distillation:
    """A student and a teacher in evaluation mode: inputs and labels -> the loss, in the precision of `amp`."""

    student: nn.Module
    teacher: nn.Module  # its weights' dtype is that of what it sees
    weights: dict[str, float]  # alpha, beta
    amp: torch.dtype | None = None

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] or events [B, T, C, H, W], of which the teacher sees the mean over T; labels [B]."""
        with torch.autocast(inputs.device.type, dtype=self.amp, enabled=self.amp is not None):
            of_student, teacher_logits = logits(self.student, self.teacher, inputs)
        if self.amp is not None:
            of_student, teacher_logits = of_student.float(), teacher_logits.float()
        return published_loss.seal_loss(of_student, teacher_logits, labels, **self.weights)
