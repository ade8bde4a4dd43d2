"""ImageNet as class folders of images."""

from __future__ import annotations

import struct
from pathlib import Path

from PIL import Image
from torchvision.datasets import ImageFolder

from .errors import DataError
from .splits import Splits
from .transforms import Transform, image_transforms

_HOW_TO_GET = (
    "get ImageNet (ILSVRC2012) from image-net.org and lay it out as train/<class>/ and val/<class>/ folders of images"
)


def read_image(path: str) -> Image.Image:
    """The image as RGB.

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Pillow's format readers raise all of these on files that are cut or changed.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = str(error).replace("\n", " ")
        raise DataError(f"{path} cannot be read as an image ({reason}); unpack it again or delete it.") from None


def _images(folder: Path, transform: Transform) -> ImageFolder:
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; {_HOW_TO_GET}.")
    children = list(folder.iterdir())
    if not any(child.is_dir() for child in children):
        if any(child.is_file() for child in children):
            raise DataError(
                f"{folder} holds its files flat, as ImageNet's tar unpacks, so their classes are unknown; move each "
                f"image into {folder.name}/<class>/, the class being the one that the development kit's ground truth "
                "names."
            )
        raise DataError(f"{folder} is empty; {_HOW_TO_GET}.")
    images = ImageFolder(str(folder), transform=transform, loader=read_image, allow_empty=True)
    empty = sorted(set(range(len(images.classes))) - set(images.targets))
    if empty:
        names = ", ".join(images.classes[label] for label in empty[:3]) + (" and others" if len(empty) > 3 else "")
        raise DataError(f"{folder} has class folders without an image ({names}); fill them or delete them.")
    return images


def load(
    name: str, root: Path, *, role: str, time_steps: int, auto_aug: bool | None = None, cutout: bool | None = None
) -> Splits:
    """Class folders under `root`; the arguments are those of `seal_fast.train.data.load`.

    The number of classes is the number of folders, so that a part of ImageNet can stand in for the whole.
    """
    transforms = image_transforms(name, role=role, auto_aug=auto_aug, cutout=cutout)
    if not root.is_dir():
        raise DataError(f"{root} is missing; {_HOW_TO_GET}.")
    train, val = _images(root / "train", transforms.train), _images(root / "val", transforms.val)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[0]
        has, lacks = ("train", "val") if odd in train.classes else ("val", "train")
        raise DataError(
            f"{root} must have the same class folders in train and val, but {has} has {odd} and {lacks} has not; "
            f"{_HOW_TO_GET}."
        )
    return Splits(
        name,
        train,
        val,
        num_classes=len(train.classes),
        in_channels=3,
        image_size=224,
        events=False,
        classes=tuple(train.classes),
        finish_train=transforms.finish_train,
        finish_val=transforms.finish_val,
    )
