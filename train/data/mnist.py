"""MNIST as its IDX files, in the layout in which torchvision unpacks them or without its folders."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from .errors import DataError
from .folders import check_root, is_file, is_folder, not_found, unreadable
from .in_memory import ImagesInMemory
from .splits import Splits
from .transforms import image_transforms

SIZE = 28
_FOLDERS = ("MNIST/raw", "raw", ".")
_PARTS = ("train", "t10k")
_FILES = tuple(f"{part}-{kind}-ubyte" for part in _PARTS for kind in ("images-idx3", "labels-idx1"))
_GZIP = b"\x1f\x8b"  # its first bytes
_UINT8 = 8  # IDX's number for the type
_KINDS = {1: "labels", 3: "images"}  # by the number of dimensions


def _find(root: Path, how_to_get: str) -> list[Path]:
    """The four files, plain or else compressed: from the first folder that has all, or else the one that has most."""
    found = {}
    for folder in (root / inner for inner in _FOLDERS):
        either = [(folder / name, folder / f"{name}.gz") for name in _FILES]
        there = is_folder(folder)
        found[folder] = [next((path for path in paths if there and is_file(path)), None) for paths in either]
    folder = max(found, key=lambda folder: sum(path is not None for path in found[folder]))
    missing = [name for name, path in zip(_FILES, found[folder], strict=True) if path is None]
    if len(missing) == len(_FILES):
        fault = f"has no {_FILES[0]}, plain or as .gz, in it, in raw or in MNIST/raw, nor the other files of MNIST"
        raise not_found(root, fault, how_to_get, _fits)
    if missing:
        raise DataError(f"{folder / missing[0]} is missing, and so is {missing[0]}.gz; {how_to_get}.")
    return found[folder]


def _fits(folder: Path) -> bool:
    inner = [folder / part for part in _FOLDERS]
    return any(is_folder(part) and is_file(part / f"{_FILES[0]}{end}") for part in inner for end in ("", ".gz"))


def _around(root: Path) -> Path:
    """Where torchvision would put its folder MNIST/raw, of which `root` may be a part."""
    folder = root.parent if root.name == "raw" else root
    return folder.parent if folder.name == "MNIST" else root


def _read(path: Path, dimensions: int, how_to_get: str) -> np.ndarray:
    """The array of an IDX file, uint8 with so many dimensions.

    The file is two zero bytes, the type and the number of dimensions in a byte each, the sizes as big-endian uint32,
    and the elements, the last index fastest (yann.lecun.com/exdb/mnist).
    """
    try:
        with path.open("rb") as file:
            content = file.read()
        if path.suffix == ".gz":
            if not content.startswith(_GZIP[: len(content)]):
                raise DataError(f"{path} is no gzip file: it begins with {content[:2].hex()} instead of {_GZIP.hex()}.")
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        reason = str(error).replace("\n", " ")
        raise DataError(f"{path} is truncated or corrupt ({reason}); delete it and {how_to_get}.") from None
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from None
    magic = bytes((0, 0, _UINT8, dimensions))
    if not magic.startswith(content[:4]):
        raise DataError(
            f"{path} is no IDX file of {_KINDS[dimensions]}: it begins with {content[:4].hex()} instead of "
            f"{magic.hex()}."
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(
            f"{path} is truncated: it has {len(content)} bytes, where its header alone takes {header}; delete it and "
            f"{how_to_get}."
        )
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    expected = header + math.prod(shape)
    if len(content) != expected:
        fault = "truncated" if len(content) < expected else "too long"
        raise DataError(
            f"{path} is {fault}: it has {len(content)} bytes instead of the {expected} that its header announces; "
            f"delete it and {how_to_get}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_part(images_path: Path, labels_path: Path, how_to_get: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,28,28] and labels int64 [N]."""
    images, labels = _read(images_path, 3, how_to_get), _read(labels_path, 1, how_to_get)
    if images.shape[1:] != (SIZE, SIZE):
        shown = "x".join(map(str, images.shape[1:]))
        raise DataError(f"{images_path} holds images of {shown} pixels instead of {SIZE}x{SIZE}.")
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{images_path} holds {len(images)} images and {labels_path.name} {len(labels)} labels, where one label "
            "for each image is expected."
        )
    if labels.max() > 9:
        raise DataError(f"{labels_path} holds the label {labels.max()}, outside 0 to 9.")
    return images, labels.astype(np.int64)


def load(
    name: str, root: Path, *, role: str, time_steps: int, auto_aug: bool | None = None, cutout: bool | None = None
) -> Splits:
    """MNIST under `root`; the arguments are those of `seal_fast.train.data.load`.

    The files are in `root`, in raw or in MNIST/raw inside it, plain or as .gz. Checksums are not compared, so that a
    part of the set can stand in for the whole.
    """
    how_to_get = f'get it with torchvision.datasets.MNIST("{_around(root)}", download=True)'
    check_root(root, how_to_get)
    transforms = image_transforms(name, role=role, auto_aug=auto_aug, cutout=cutout)
    train_images, train_labels, val_images, val_labels = _find(root, how_to_get)
    return Splits(
        name,
        ImagesInMemory(*_read_part(train_images, train_labels, how_to_get), transforms.train),
        ImagesInMemory(*_read_part(val_images, val_labels, how_to_get), transforms.val),
        num_classes=10,
        in_channels=1,
        image_size=SIZE,
        events=False,
        classes=tuple("0123456789"),
        finish_train=transforms.finish_train,
        finish_val=transforms.finish_val,
    )
