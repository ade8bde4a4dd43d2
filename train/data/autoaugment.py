"""AutoAugment (arXiv 1805.09501) as the published SeAl-KD (arXiv 2605.14252) has it.

It differs from torchvision's: what an operation uncovers becomes grey, shears are bicubic and about the corner,
rotations have one direction, and shifts are shares of the image's side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

_GREY = "#808080"  # 128 in each channel, one or three
_NEAREST, _BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BICUBIC


def _affine(image: Image.Image, matrix: tuple[float, ...], resampling: Image.Resampling) -> Image.Image:
    """The pixel at (x, y) comes from (ax + by + c, dx + ey + f), where the matrix is (a, b, c, d, e, f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=_GREY)


def _shear_x(image: Image.Image, magnitude: float) -> Image.Image:
    return _affine(image, (1, magnitude, 0, 0, 1, 0), _BICUBIC)


def _shear_y(image: Image.Image, magnitude: float) -> Image.Image:
    return _affine(image, (1, 0, 0, magnitude, 1, 0), _BICUBIC)


def _translate_x(image: Image.Image, magnitude: float) -> Image.Image:
    return _affine(image, (1, 0, magnitude * image.width, 0, 1, 0), _NEAREST)


def _translate_y(image: Image.Image, magnitude: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, magnitude * image.height), _NEAREST)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, fillcolor=_GREY)


def _color(image: Image.Image, magnitude: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(1 + magnitude)


def _contrast(image: Image.Image, magnitude: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(1 + magnitude)


def _sharpness(image: Image.Image, magnitude: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(1 + magnitude)


def _brightness(image: Image.Image, magnitude: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1 + magnitude)


def _autocontrast(image: Image.Image, _: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, _: float) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, _: float) -> Image.Image:
    return ImageOps.invert(image)


class Operation(NamedTuple):
    """A change of a PIL image, RGB or L.

    Attributes:
        apply: (image, magnitude) → the changed image.
        magnitudes: what the indices 0 to 9 of a policy mean.
        signed: whether a fair coin, thrown anew each time, chooses the magnitude's sign.
    """

    apply: Callable[[Image.Image, float], Image.Image]
    magnitudes: list[float]
    signed: bool = False


_SHEAR = np.linspace(0, 0.3, 10).tolist()  # pixels a pixel
_SHIFT = np.linspace(0, 150 / 331, 10).tolist()  # of the side
_CHANGE = np.linspace(0, 0.9, 10).tolist()  # of the factor 1, which leaves the image as it is
_NONE = [0.0] * 10

OPERATIONS = {
    "shearX": Operation(_shear_x, _SHEAR, signed=True),
    "shearY": Operation(_shear_y, _SHEAR, signed=True),
    "translateX": Operation(_translate_x, _SHIFT, signed=True),
    "translateY": Operation(_translate_y, _SHIFT, signed=True),
    "rotate": Operation(_rotate, np.linspace(0, 30, 10).tolist()),  # degrees, counter-clockwise
    "color": Operation(_color, _CHANGE, signed=True),
    "contrast": Operation(_contrast, _CHANGE, signed=True),
    "sharpness": Operation(_sharpness, _CHANGE, signed=True),
    "brightness": Operation(_brightness, _CHANGE, signed=True),
    "posterize": Operation(ImageOps.posterize, [8, 8, 7, 7, 6, 6, 5, 5, 4, 4]),  # bits that are kept
    "solarize": Operation(ImageOps.solarize, np.linspace(256, 0, 10).tolist()),  # levels from here on are inverted
    "autocontrast": Operation(_autocontrast, _NONE),
    "equalize": Operation(_equalize, _NONE),
    "invert": Operation(_invert, _NONE),
}

# Pairs of (probability, operation, index of its magnitude).
POLICIES = {
    "CIFAR": (
        ((0.1, "invert", 7), (0.2, "contrast", 6)),
        ((0.7, "rotate", 2), (0.3, "translateX", 9)),
        ((0.8, "sharpness", 1), (0.9, "sharpness", 3)),
        ((0.5, "shearY", 8), (0.7, "translateY", 9)),
        ((0.5, "autocontrast", 8), (0.9, "equalize", 2)),
        ((0.2, "shearY", 7), (0.3, "posterize", 7)),
        ((0.4, "color", 3), (0.6, "brightness", 7)),
        ((0.3, "sharpness", 9), (0.7, "brightness", 9)),
        ((0.6, "equalize", 5), (0.5, "equalize", 1)),
        ((0.6, "contrast", 7), (0.6, "sharpness", 5)),
        ((0.7, "color", 7), (0.5, "translateX", 8)),
        ((0.3, "equalize", 7), (0.4, "autocontrast", 8)),
        ((0.4, "translateY", 3), (0.2, "sharpness", 6)),
        ((0.9, "brightness", 6), (0.2, "color", 8)),
        ((0.5, "solarize", 2), (0.0, "invert", 3)),
        ((0.2, "equalize", 0), (0.6, "autocontrast", 0)),
        ((0.2, "equalize", 8), (0.8, "equalize", 4)),
        ((0.9, "color", 9), (0.6, "equalize", 6)),
        ((0.8, "autocontrast", 4), (0.2, "solarize", 8)),
        ((0.1, "brightness", 3), (0.7, "color", 0)),
        ((0.4, "solarize", 5), (0.9, "autocontrast", 3)),
        ((0.9, "translateY", 9), (0.7, "translateY", 9)),
        ((0.9, "autocontrast", 2), (0.8, "solarize", 3)),
        ((0.8, "equalize", 8), (0.1, "invert", 3)),
        ((0.7, "translateY", 9), (0.9, "autocontrast", 1)),
    ),
    "ImageNet": (
        ((0.4, "posterize", 8), (0.6, "rotate", 9)),
        ((0.6, "solarize", 5), (0.6, "autocontrast", 5)),
        ((0.8, "equalize", 8), (0.6, "equalize", 3)),
        ((0.6, "posterize", 7), (0.6, "posterize", 6)),
        ((0.4, "equalize", 7), (0.2, "solarize", 4)),
        ((0.4, "equalize", 4), (0.8, "rotate", 8)),
        ((0.6, "solarize", 3), (0.6, "equalize", 7)),
        ((0.8, "posterize", 5), (1.0, "equalize", 2)),
        ((0.2, "rotate", 3), (0.6, "solarize", 8)),
        ((0.6, "equalize", 8), (0.4, "posterize", 6)),
        ((0.8, "rotate", 8), (0.4, "color", 0)),
        ((0.4, "rotate", 9), (0.6, "equalize", 2)),
        ((0.0, "equalize", 7), (0.8, "equalize", 8)),
        ((0.6, "invert", 4), (1.0, "equalize", 8)),
        ((0.6, "color", 4), (1.0, "contrast", 8)),
        ((0.8, "rotate", 8), (1.0, "color", 2)),
        ((0.8, "color", 8), (0.8, "solarize", 7)),
        ((0.4, "sharpness", 7), (0.6, "invert", 8)),
        ((0.6, "shearX", 5), (1.0, "equalize", 9)),
        ((0.4, "color", 0), (0.6, "equalize", 3)),
        ((0.4, "equalize", 7), (0.2, "solarize", 4)),
        ((0.6, "solarize", 5), (0.6, "autocontrast", 5)),
        ((0.6, "invert", 4), (1.0, "equalize", 8)),
        ((0.6, "color", 4), (1.0, "contrast", 8)),
    ),
}


class AutoAugment:
    """One pair of operations, each of them with its probability, on a PIL image, RGB or L.

    All random numbers come from one `torch.rand`, and so from torch's global generator.

    Args:
        policy: "CIFAR" or "ImageNet": a table of pairs, each as likely.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy

    def choose(self) -> list[tuple[str, float]]:
        """The operations for one image in their order, with their magnitudes."""
        pairs = POLICIES[self.policy]
        which, *draws = torch.rand(5).tolist()
        pair = pairs[int(which * len(pairs))]
        chosen = []
        for (probability, name, index), draw, coin in zip(pair, draws[:2], draws[2:], strict=True):
            if draw < probability:
                operation = OPERATIONS[name]
                magnitude = operation.magnitudes[index]
                chosen.append((name, -magnitude if operation.signed and coin < 0.5 else magnitude))
        return chosen

    def __call__(self, image: Image.Image) -> Image.Image:
        """An image → the changed image, of the same size and mode."""
        for name, magnitude in self.choose():
            image = OPERATIONS[name].apply(image, magnitude)
        return image

    def __repr__(self) -> str:
        return f"AutoAugment({self.policy!r})"
