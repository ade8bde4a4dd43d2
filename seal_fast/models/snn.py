"""Spiking students, with the published state-dict names.

Activations are [T·B, C, H, W] with T outermost. A static image passes the stem once; its neurons then run over T equal
steps. No student keeps state between calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..kernels.bn_lif.reference import batch_norm
from ..nn import LIFNode
from ..ops._arguments import require_float_tensor, require_integer, shape
from .ann import initialise


class Neuron(LIFNode):
    """A LIFNode that starts each call at rest and takes along the batch norm before it, to run both as one operator.

    Being a module, it lets forward hooks see the spikes of its layer.
    """

    def forward(  # noqa: D102
        self,
        y: torch.Tensor,  # [T·B, C, ...], or [B, C, ...] where static
        bn: nn.Module | None,
        *,
        time_steps: int,
        residual: torch.Tensor | None = None,
        residual_bn: nn.Module | None = None,
        static: bool = False,
        return_membrane_input: bool = False,
    ):
        if bn is not None:
            return ops.bn_lif(
                y,
                bn,
                self,
                time_steps=time_steps,
                residual=residual,
                residual_bn=residual_bn,
                static=static,
                return_membrane_input=return_membrane_input,
            )
        steps = y.expand(time_steps, *y.shape) if static else y.unflatten(0, (time_steps, -1))
        return ops.lif(steps, return_v_last=False, **self.options)[0].flatten(0, 1)


class Block(nn.Module):
    """conv → BN → LIF → conv → BN + shortcut → LIF, on spikes."""

    def __init__(self, in_channels: int, channels: int, stride: int, neuron):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.lif1 = neuron()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.lif2 = neuron()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            convolution = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, spikes: torch.Tensor, time_steps: int) -> torch.Tensor:  # noqa: D102
        inner = self.conv2(self.lif1(self.conv1(spikes), self.bn1, time_steps=time_steps))
        shortcut, bn = spikes, None
        if len(self.shortcut):
            convolution, bn = self.shortcut
            shortcut = convolution(spikes)
        return self.lif2(inner, self.bn2, time_steps=time_steps, residual=shortcut, residual_bn=bn)


class PreActBlock(nn.Module):
    """The pre-activation block: the shortcut carries the membrane input, not the spikes.

    The neuron before conv1 stands at the end of the block before, so that it runs in one operator with that block's
    batch norm and sum; the last block of the network ends without one (lif2 is None).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, neuron):
        super().__init__()
        downsample = None
        if stride != 1 or in_channels != channels:  # made first, as published: a seed then gives the published biases
            downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride), nn.BatchNorm2d(channels))
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.lif1 = neuron()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.lif2 = neuron()
        self.downsample = downsample

    def forward(  # noqa: D102
        self,
        spikes: torch.Tensor,  # [T·B, C, H, W]
        membrane_input: torch.Tensor,  # as spikes, or [B, C, H, W] where static
        time_steps: int,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        inner = self.conv2(self.lif1(self.conv1(spikes), self.bn1, time_steps=time_steps))
        shortcut, bn = membrane_input, None
        if self.downsample is not None:
            convolution, bn = self.downsample
            shortcut = convolution(shortcut)
        if self.lif2 is not None:
            return self.lif2(
                inner,
                self.bn2,
                time_steps=time_steps,
                residual=shortcut,
                residual_bn=bn,
                return_membrane_input=True,
            )
        if bn is not None:
            shortcut = batch_norm(shortcut, bn, repeats=len(spikes) // len(shortcut))
        return None, batch_norm(inner, self.bn2) + shortcut


class Student(nn.Module):
    """What the students share: the input's layout, the stages, and the readout."""

    def __init__(self, in_channels: int, time_steps: int):
        super().__init__()
        self.in_channels = in_channels
        self.time_steps = time_steps

    def add_stages(self, block: type[nn.Module], depths, widths, neuron) -> None:
        """Add layer1, layer2, …; the first block of each but the first halves the resolution."""
        channels = widths[0]
        self.stages = []
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for position in range(depth):
                blocks.append(block(channels, width, 2 if index > 1 and position == 0 else 1, neuron))
                channels = width
            self.stages.append(f"layer{index}")
            self.add_module(self.stages[-1], nn.ModuleList(blocks))

    def blocks(self):
        """The blocks of all stages, in order."""
        for stage in self.stages:
            yield from getattr(self, stage)

    def frames(self, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Images [B,C,H,W], which are static, or events [T,B,C,H,W] as rows [T·B,C,H,W]."""
        require_float_tensor("input", x, "[B, C, H, W] or [T, B, C, H, W]")
        if x.dim() not in (4, 5) or x.shape[-3] != self.in_channels or 0 in x.shape:
            layout = f"images [B, {self.in_channels}, H, W] or events [T, B, {self.in_channels}, H, W]"
            raise ValueError(f"input must be {layout}; got {shape(x)}.")
        if x.dim() == 4:
            return x, True
        if x.shape[0] != self.time_steps:
            raise ValueError(f"events must have T = {self.time_steps} time steps, outermost; got {shape(x)}.")
        return x.flatten(0, 1), False

    def pooled(self, activations: torch.Tensor) -> torch.Tensor:
        """[T·B, C, H, W] -> [T·B, C]."""
        return F.adaptive_avg_pool2d(activations, 1).flatten(1)

    def extra_repr(self) -> str:  # noqa: D102
        return f"time_steps={self.time_steps}"


class ResNet(Student):
    """Spiking ResNet with blocks on spikes: resnet18, and resnet19 with a hidden spiking layer in the readout.

    Weights start from torch's default initialisation, as published.
    """

    def __init__(self, depths, widths, hidden: int | None, num_classes: int, in_channels: int, time_steps: int, neuron):
        super().__init__(in_channels, time_steps)
        convolution = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.conv0 = nn.Sequential(convolution, nn.BatchNorm2d(widths[0]))
        self.lif0 = neuron()
        self.add_stages(Block, depths, widths, neuron)
        if hidden is None:
            self.classifier = nn.Sequential(nn.Linear(widths[-1], num_classes))
        else:
            layers = nn.Linear(widths[-1], hidden), neuron(), nn.Linear(hidden, num_classes)
            self.classifier = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B,C,H,W] or events [T,B,C,H,W] -> logits [T,B,K]."""
        x, static = self.frames(x)
        T = self.time_steps
        convolution, bn = self.conv0
        spikes = self.lif0(convolution(x), bn, time_steps=T, static=static)
        for block in self.blocks():
            spikes = block(spikes, T)
        features = self.pooled(spikes)
        for layer in self.classifier:
            features = layer(features, None, time_steps=T) if isinstance(layer, Neuron) else layer(features)
        return features.unflatten(0, (T, -1))


class PreActResNet(Student):
    """Spiking pre-activation ResNet for ImageNet, with Kaiming's initialisation."""

    def __init__(self, depths, widths, num_classes: int, in_channels: int, time_steps: int, neuron):
        super().__init__(in_channels, time_steps)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 7, 2, 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.lif1 = neuron()
        self.add_stages(PreActBlock, depths, widths, neuron)
        self.layer4[-1].lif2 = None
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B,C,H,W] or events [T,B,C,H,W] -> logits [T,B,K]."""
        x, static = self.frames(x)
        T = self.time_steps
        membrane_input = self.maxpool(batch_norm(self.conv1(x), self.bn1, repeats=T if static else 1))
        spikes = self.lif1(membrane_input, None, time_steps=T, static=static)
        for block in self.blocks():
            spikes, membrane_input = block(spikes, membrane_input, T)
        return self.fc(self.pooled(membrane_input)).unflatten(0, (T, -1))


# All but resnet8, a small one for small images, are the published ones.
_ARCHITECTURES = {
    "resnet8": lambda **options: ResNet((1, 1, 1), (32, 64, 128), None, **options),
    "resnet18": lambda **options: ResNet((2, 2, 2, 2), (64, 128, 256, 512), None, **options),
    "resnet19": lambda **options: ResNet((3, 3, 2), (128, 256, 512), 256, **options),
    "preact_resnet18": lambda **options: PreActResNet((2, 2, 2, 2), (64, 128, 256, 512), **options),
    "preact_resnet34": lambda **options: PreActResNet((3, 4, 6, 3), (64, 128, 256, 512), **options),
}
STUDENTS = tuple(_ARCHITECTURES)


def student(
    arch: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    time_steps: int = 4,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    detach_reset: bool = False,
    backend: str = "auto",
) -> Student:
    """A spiking student with the published neuron: input not divided by tau, sigmoid surrogate with α = 4.

    After `torch.manual_seed(n)`, resnet18, resnet19 and preact_resnet34 have the weights that the published
    constructors give them.

    Args:
        arch: "resnet18", "resnet19", "preact_resnet18" or "preact_resnet34"; or "resnet8", a small one for small
            images.
        num_classes: K.
        in_channels: C of images or events.
        time_steps: T.
        tau: Membrane time constant of each neuron; this and the rest as in `seal_fast.lif`.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None for soft reset.
        detach_reset: Whether the reset passes no gradient to the spike.
        backend: "auto", "triton", "cupy", "cpu" or "torch".

    Returns:
        A module: images [B, C, H, W] or events [T, B, C, H, W] -> logits [T, B, K].

    Raises:
        TypeError, ValueError: An argument is not one of the values above.
    """
    if arch not in STUDENTS:
        raise ValueError(f"arch of a student must be one of {', '.join(STUDENTS)}; got {arch!r}.")
    require_integer("num_classes", num_classes, 2)
    require_integer("in_channels", in_channels, 1)
    require_integer("time_steps", time_steps, 1)

    def neuron() -> Neuron:
        return Neuron(
            tau=tau,
            decay_input=False,
            v_threshold=v_threshold,
            v_reset=v_reset,
            detach_reset=detach_reset,
            backend=backend,
        )

    return _ARCHITECTURES[arch](num_classes=num_classes, in_channels=in_channels, time_steps=time_steps, neuron=neuron)
