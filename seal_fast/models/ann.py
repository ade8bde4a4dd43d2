"""Teachers: residual networks of ordinary neurons (He et al. 2016), with the published state-dict names."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..ops._arguments import require_integer

SMALL_IMAGE_CLASSES = 100  # a network for more classes than these has the stem for large images
FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of cuDNN's fused convolutions
EVENT_CHANNELS = 2  # of frames of events: one for each polarity


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        y = _rectified(self.conv1, self.bn1, x)
        shortcut = x if self.downsample is None else self.downsample(x)
        return _rectified(self.conv2, self.bn2, y, shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; the stride is in the 3×3."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        y = _rectified(self.conv1, self.bn1, x)
        y = _rectified(self.conv2, self.bn2, y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return _rectified(self.conv3, self.bn3, y, shortcut)


# arch -> (block, blocks per stage, channels per stage, hidden units before the last linear layer)
# All but resnet8, a small one for small images, are the published ones.
_ARCHITECTURES = {
    "resnet8": (BasicBlock, (1, 1, 1), (32, 64, 128), None),
    "resnet18": (BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), None),
    "resnet18_dvs": (BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), None),
    "resnet19": (BasicBlock, (3, 3, 2), (128, 256, 512), 256),
    "resnet34": (BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512), None),
    "resnet50": (Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), None),
}
TEACHERS = tuple(_ARCHITECTURES)
WITHOUT_STEMS = ("resnet8", "resnet19")  # these have a 3×3 convolution for any number of classes


class Teacher(nn.Module):
    """A residual network: images [B, C, H, W] -> logits [B, K]."""

    def __init__(self, arch: str, num_classes: int, in_channels: int, imagenet_stem: bool):
        super().__init__()
        block, depths, widths, hidden = _ARCHITECTURES[arch]
        if imagenet_stem:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        self.stages = []
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for position in range(depth):
                blocks.append(block(channels, width, stride=2 if index > 1 and position == 0 else 1))
                channels = width * block.expansion
            self.stages.append(f"layer{index}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        if hidden is None:
            self.fc = nn.Linear(channels, num_classes)
        else:
            self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        x = self.maxpool(_rectified(self.conv1, self.bn1, x))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def teacher(arch: str, *, num_classes: int, in_channels: int | None = None, stem: str | None = None) -> Teacher:
    """A teacher network.

    After `torch.manual_seed(n)` a published one has the weights that the published constructor gives it.

    Args:
        arch: "resnet18", "resnet19", "resnet34" or "resnet50"; "resnet18_dvs", a resnet18 that takes frames of events
            by default; or "resnet8", a small one for small images.
        num_classes: K.
        in_channels: C of the images; None for 3, and for 2 with "resnet18_dvs".
        stem: "imagenet", a 7×7 convolution with stride 2 and pooling (resnet8 and resnet19 have none); "cifar", a 3×3
            convolution; None, as published: "imagenet" for more than 100 classes.

    Returns:
        A module: images [B, C, H, W] -> logits [B, K].

    Raises:
        ValueError: An argument is not one of the values above.
    """
    if arch not in TEACHERS:
        raise ValueError(f"arch of a teacher must be one of {', '.join(TEACHERS)}; got {arch!r}.")
    if stem not in (None, "cifar", "imagenet"):
        raise ValueError(f"stem must be 'cifar', 'imagenet' or None; got {stem!r}.")
    require_integer("num_classes", num_classes, 2)
    if in_channels is None:
        in_channels = EVENT_CHANNELS if arch == "resnet18_dvs" else 3
    require_integer("in_channels", in_channels, 1)
    if arch in WITHOUT_STEMS:
        if stem == "imagenet":
            raise ValueError(f"{arch} has no 'imagenet' stem; use 'cifar' or None.")
        stem = "cifar"
    elif stem is None:
        stem = "imagenet" if num_classes > SMALL_IMAGE_CLASSES else "cifar"
    return Teacher(arch, num_classes, in_channels, imagenet_stem=stem == "imagenet")


def folded(network: Teacher) -> Teacher:
    """A copy of a teacher in evaluation mode whose batch norms are part of the convolutions before them.

    On an NVIDIA GPU, without gradients, cuDNN computes a convolution, its bias, the shortcut's sum and the ReLU in one
    kernel; forward hooks of these convolutions are not called then.
    """
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential):
            pairs = zip(range(len(module)), range(1, len(module)), strict=False)
        else:
            pairs = ((f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(module, f"bn{i}"))
        for convolution, bn in [(str(first), str(second)) for first, second in pairs]:
            if isinstance(module._modules[bn], nn.BatchNorm2d):
                fused = fuse_conv_bn_eval(module._modules[convolution], module._modules[bn])
                module._modules[convolution], module._modules[bn] = fused, nn.Identity()
    return network


def initialise(network: nn.Module) -> None:
    """Kaiming's initialisation for convolutions (fan out, as torchvision's ResNet); torch's own for the rest."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _rectified(
    convolution: nn.Conv2d, norm: nn.Module, x: torch.Tensor, shortcut: torch.Tensor | None = None
) -> torch.Tensor:
    """ReLU of the normalised convolution of x [B, C, H, W], plus the shortcut, which has the result's shape."""
    if isinstance(norm, nn.Identity) and _fuses(convolution.weight, x):
        x, weight, bias = x.to(convolution.weight.dtype), convolution.weight, convolution.bias
        geometry = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
        if shortcut is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, weight, shortcut, 1.0, bias, *geometry)
    y = norm(convolution(x))
    return F.relu(y if shortcut is None else y + shortcut, inplace=True)


def _fuses(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether cuDNN's fused convolutions compute here what the modules would.

    They have no gradient and no kernel that torch.compile could trace, do not know autocast, and ignore requests for
    deterministic algorithms. They obey cuDNN's `benchmark` and `allow_tf32`, and copy what is not in the layout that
    torch's own convolution would choose.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not x.is_cuda or torch.version.hip:
        return False
    cudnn = torch.backends.cudnn
    if not (cudnn.enabled and cudnn.is_available()):
        return False
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    computed = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return x.dtype in FUSED_DTYPES and weight.dtype == computed


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
