"""The augmentation of each dataset: the published one, where the published code runs on it.

Every random number comes from torch's global generator, which `seal_fast.train.batches` seeds anew for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from .autoaugment import AutoAugment
from .draws import draw

Transform = Callable[..., Tensor]


class _Images(NamedTuple):
    mean: tuple[float, ...]
    std: tuple[float, ...]
    policy: str  # of AutoAugment
    hole: int  # side of the cutout hole, pixels
    augmented: tuple[str, ...]  # roles with AutoAugment and cutout
    train: Callable[[], list]  # geometry of the training part, made anew for each call of image_transforms
    val: Callable[[], list]  # of the held-out part


def _crop_padded() -> list:
    return [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]


def _crop_resized() -> list:
    return [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]


def _crop_centre() -> list:
    return [v2.Resize(256), v2.CenterCrop(224)]


_CIFAR = _Images((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), "CIFAR", 16, ("student",), _crop_padded, list)
_IMAGES = {
    "CIFAR10": _CIFAR,
    "CIFAR100": _CIFAR._replace(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    "imagenet": _Images(
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        "ImageNet",
        112,
        ("student", "teacher"),
        _crop_resized,
        _crop_centre,
    ),
    # None by default, as a mirrored or cut digit is another sign; the published code, whose networks take three
    # channels, would stop at its first batch.
    "MNIST": _Images((0.1307,), (0.3081,), "CIFAR", 16, (), list, list),
}


def _holes(draws: Tensor, height: int, width: int, side: int) -> Tensor:
    """Where square holes are, bool [count,H,W], one for each row of draws int64 [count,2].

    Of draws that are uniform below 2^31, each centre is uniform over the pixels.
    """
    down, right = (
        torch.arange(size, device=draws.device) - (draws[:, axis, None] % size - side // 2)
        for axis, size in enumerate((height, width))
    )
    return ((down >= 0) & (down < side))[:, :, None] & ((right >= 0) & (right < side))[:, None, :]


class Cutout:
    """Fill one square hole with zeros (DeVries and Taylor, arXiv 1708.04552).

    The hole's centre is uniform over the pixels, so near the border part of the hole lies outside; torchvision's
    RandomErasing keeps it inside. All leading axes (channels, time steps) get the same hole.

    Args:
        side: side of the hole, in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Tensor) -> Tensor:
        """Image [...,H,W] → a copy with the hole."""
        return self.of_each(image[None], draw(1).to(image.device))[0]

    def of_each(self, images: Tensor, draws: Tensor) -> Tensor:
        """Images [B,...,H,W] → a copy in which each has a hole of its own, by its row of draws [B,2]."""
        holes = _holes(draws, *images.shape[-2:], self.side)
        return images.masked_fill(holes.unflatten(0, (-1, *[1] * (images.dim() - 3))), 0)

    def __repr__(self) -> str:
        return f"Cutout({self.side})"


class Finish:
    """What is done to a whole batch of images on the device: until then they travel as bytes.

    A hole is black: it comes before the normalisation, after which black is not 0.

    Args:
        mean: of each channel, subtracted.
        std: of each channel, divided by.
        cutout: for each image, or None.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], cutout: Cutout | None = None) -> None:
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.cutout = cutout

    def __call__(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Images uint8 [B,C,H,W] → float32 [B,C,H,W]; draws [B,2] choose the holes."""
        if self.mean.device != images.device:
            self.mean, self.std = (values.to(images.device) for values in (self.mean, self.std))
        if self.cutout is not None:
            images = self.cutout.of_each(images, draw(len(images)).to(images.device) if draws is None else draws)
        return images.to(torch.float32).div_(255).sub_(self.mean).div_(self.std)


class Roll:
    """Shift cyclically by up to `reach` pixels in each axis, the same for all leading axes.

    Args:
        reach: the largest shift, in pixels; each whole number of −reach … reach is as likely.
    """

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __call__(self, image: Tensor) -> Tensor:
        """Image [...,H,W] → its shifted copy."""
        down, right = torch.randint(-self.reach, self.reach + 1, (2,)).tolist()
        return torch.roll(image, (down, right), dims=(-2, -1))

    def __repr__(self) -> str:
        return f"Roll({self.reach})"


class ImageTransforms(NamedTuple):
    """What happens to images: one by one in the workers, PIL → uint8 [C,H,W], then to batches on the device."""

    train: Transform
    val: Transform
    finish_train: Finish
    finish_val: Finish


def image_transforms(
    name: str, *, role: str, auto_aug: bool | None = None, cutout: bool | None = None
) -> ImageTransforms:
    """Transforms of the training and the held-out part.

    AutoAugment runs on the PIL image, on which its policies were found (arXiv 1805.09501).

    Args:
        name: "CIFAR10", "CIFAR100", "imagenet" or "MNIST".
        role: "student" or "teacher". AutoAugment and cutout are for both with imagenet, and for the student with CIFAR;
            crop and flip are for both with all but MNIST, whose images stay as they are.
        auto_aug: overrides the role's choice unless None.
        cutout: overrides the role's choice unless None.
    """
    images = _IMAGES[name]
    augmented = role in images.augmented
    train = images.train()
    if augmented if auto_aug is None else auto_aug:
        train.append(AutoAugment(images.policy))
    hole = Cutout(images.hole) if (augmented if cutout is None else cutout) else None
    return ImageTransforms(
        v2.Compose([*train, v2.PILToTensor()]),
        v2.Compose([*images.val(), v2.PILToTensor()]),
        Finish(images.mean, images.std, hole),
        Finish(images.mean, images.std),
    )


def event_transform(*, flip: bool, auto_aug: bool | None = None, cutout: bool | None = None) -> Transform | None:
    """Transform of the training part of event data, frames float32 [T,C,H,W] → the same shape, or None for none.

    A horizontal flip with probability one half, then one of: roll by up to 5 pixels, rotation by up to 30 degrees,
    cutout 16. All T frames of a sample are changed alike.

    Args:
        flip: whether a mirrored sample still belongs to its class.
        auto_aug: False leaves all of it out.
        cutout: False takes cutout out of the choice; True keeps it, alone if auto_aug is False.
    """
    if auto_aug is False:
        return Cutout(16) if cutout else None
    choice: Sequence = [Roll(5), v2.RandomRotation(30)]
    if cutout is not False:
        choice = [*choice, Cutout(16)]
    return v2.Compose([*([v2.RandomHorizontalFlip()] if flip else []), v2.RandomChoice(choice)])


def digit_transforms(mean: float, std: float, *, cutout: bool | None = None) -> tuple[Transform, Transform]:
    """Transforms of the training and the held-out part of DIGITS: float32 [1,8,8] → the same shape.

    Crop only, as a mirrored digit is another sign; cutout has a hole of 2 pixels.

    Args:
        mean: mean grey level, subtracted.
        std: standard deviation of the grey levels, divided by.
        cutout: True switches cutout on.
    """
    normalise = v2.Normalize([mean], [std])
    train = [v2.RandomCrop(8, padding=1), normalise, *([Cutout(2)] if cutout else [])]
    return v2.Compose(train), normalise
