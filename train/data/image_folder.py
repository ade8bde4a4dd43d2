"""ImageNet as class folders of images."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError
from .folders import check_root, hidden, is_folder, names, not_found, shortened, unreadable
from .images import read_image
from .splits import Splits
from .transforms import Transform, image_transforms

_HOW_TO_GET = (
    "get ImageNet (ILSVRC2012) from image-net.org and lay it out as train/<class>/ and val/<class>/ folders of images"
)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
_DEEPEST = 40  # folders in one another, as many links as Linux follows


class ClassFolders(Dataset):
    """Images in class folders; labels are the places of the folders' names in their order, as with torchvision.

    Args:
        folder: holds the class folders.
        transform: PIL image, RGB → uint8 [C,H,W].

    Attributes:
        classes: the names of the class folders.
        samples: path and label of each image, by class, folder and name.

    Raises:
        DataError: there are no class folders, one of them has no image, or one cannot be read.
    """

    def __init__(self, folder: Path, transform: Transform) -> None:
        self.transform = transform
        present = names(folder)
        self.classes = [name for name in present if is_folder(folder / name)]
        if not self.classes and present:
            raise _no_class_folders(folder, present)
        if not self.classes:
            raise DataError(f"{folder} is empty; {_HOW_TO_GET}.")
        self.samples: list[tuple[str, int]] = []
        empty = []
        for label, name in enumerate(self.classes):
            images = _images(str(folder / name))
            self.samples += [(path, label) for path in images]
            if not images:
                empty.append(name)
        if empty:
            shown = ", ".join(empty[:3]) + (" and others" if len(empty) > 3 else "")
            raise DataError(
                f"{folder} has class folders without an image ({shown}); fill them with images, whose names end in "
                f"{', '.join(_SUFFIXES)}."
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def _no_class_folders(folder: Path, present: list[str]) -> DataError:
    """The sentence for a folder that holds these files alone."""
    archives = [name for name in present if name.startswith("n") and name.endswith(".tar")]
    if archives:
        return DataError(
            f"{folder} holds the classes packed ({shortened(archives)}); unpack each into a folder of its name, as in: "
            f"mkdir {archives[0][:-4]} && tar -xf {archives[0]} -C {archives[0][:-4]}."
        )
    truth = ", the class being the one that the development kit's ground truth names" if folder.name == "val" else ""
    return DataError(
        f"{folder} holds its files flat ({shortened(present)}), so their classes are unknown; move each image into "
        f"{folder.name}/<class>/{truth}."
    )


def _images(folder: str) -> list[str]:
    """Images in a folder and in the folders in it, which may be links, in torchvision's order.

    Raises:
        DataError: one of the folders cannot be read, or is a link that leads round in a circle.
    """
    found: list[tuple[str, str]] = []
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        if parent.count(os.sep) - folder.count(os.sep) > _DEEPEST:
            raise DataError(f"{parent} cannot be read: links lead round in a circle.")
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    if hidden(entry.name):
                        continue
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif entry.name.lower().endswith(_SUFFIXES):
                        found.append((parent, entry.name))
        except OSError as error:
            raise unreadable(error.filename or parent, error) from None
    return [os.path.join(parent, name) for parent, name in sorted(found)]


def _is_root(folder: Path) -> bool:
    return is_folder(folder / "train") and is_folder(folder / "val")


def load(
    name: str, root: Path, *, role: str, time_steps: int, auto_aug: bool | None = None, cutout: bool | None = None
) -> Splits:
    """Class folders under `root`; the arguments are those of `seal_fast.train.data.load`.

    The number of classes is the number of folders, so that a part of ImageNet can stand in for the whole.
    """
    transforms = image_transforms(name, role=role, auto_aug=auto_aug, cutout=cutout)
    check_root(root, _HOW_TO_GET)
    for part in ("train", "val"):
        if not is_folder(root / part):
            raise not_found(root, f"has no folder {part}", _HOW_TO_GET, _is_root)
    train, val = ClassFolders(root / "train", transforms.train), ClassFolders(root / "val", transforms.val)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))[0]
        has, lacks = ("train", "val") if odd in train.classes else ("val", "train")
        raise DataError(
            f"{root} must have the same class folders in train and val, but {has} has {odd} and {lacks} has not."
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
