"""CIFAR-10 and CIFAR-100 in the layout in which torchvision unpacks them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from .errors import DataError
from .in_memory import ImagesInMemory
from .splits import Splits
from .transforms import image_transforms


class _ForbiddenError(pickle.UnpicklingError):
    """A pickle asks for more than arrays need; the message says for what."""


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode` for the one encoding that protocol 2 needs to carry bytes."""
    if encoding != "latin1":
        raise _ForbiddenError(f"the encoding {encoding!r}")
    return text.encode(encoding)


def _dtype(*arguments: Any) -> np.dtype:
    """`numpy.dtype`, but for arrays of Python objects: their bytes would be taken for addresses."""
    dtype = np.dtype(*arguments)
    if dtype.hasobject:
        raise _ForbiddenError("an array of Python objects")
    return dtype


def _from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """What protocol 5 stores a contiguous array as."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers; no file may have code run.

    The names are those under which numpy 1 and numpy 2 pickle an array.
    """

    _reconstruct = np.empty(0).__reduce__()[0]
    _admitted = {  # noqa: RUF012
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise _ForbiddenError(f"{module}.{name}")
        return self._admitted[module, name]


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _read(path: Path, how_to_get: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {how_to_get}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); allow reading it or {how_to_get}.") from None
    except _ForbiddenError as error:
        raise DataError(
            f"{path} asks for {error} where arrays and labels belong, so it was not read; delete it and {how_to_get}."
        ) from None
    except Exception as error:  # a broken pickle stream can raise anything
        raise DataError(
            f"{path} is truncated or corrupt ({type(error).__name__}); delete it and {how_to_get}."
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__} instead of a dict; delete it and {how_to_get}.")
    return {_text(key): value for key, value in content.items()}


def _read_batch(path: Path, num_classes: int, how_to_get: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,32,32,3] and labels int64 [N]."""
    entry = _read(path, how_to_get)
    data = entry.get("data")
    labels = entry.get("fine_labels", entry.get("labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"{path} holds no images as uint8 rows of 3072 numbers; delete it and {how_to_get}.")
    if not isinstance(labels, list | np.ndarray) or not all(isinstance(label, int | np.integer) for label in labels):
        raise DataError(f"{path} holds no list of whole-number labels; delete it and {how_to_get}.")
    if len(labels) != len(data) or not len(data):
        raise DataError(f"{path} holds {len(data)} images and {len(labels)} labels; delete it and {how_to_get}.")
    if min(labels) < 0 or max(labels) >= num_classes:
        wrong = min(labels) if min(labels) < 0 else max(labels)
        raise DataError(f"{path} holds the label {wrong}, outside 0 to {num_classes - 1}; delete it and {how_to_get}.")
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.asarray(labels, dtype=np.int64)


def load(
    name: str, root: Path, *, role: str, time_steps: int, auto_aug: bool | None = None, cutout: bool | None = None
) -> Splits:
    """CIFAR10 or CIFAR100 under `root`; the arguments are those of `seal_fast.train.data.load`.

    Checksums are not compared, so that a part of the set can stand in for the whole.
    """
    layout = {"CIFAR10": datasets.CIFAR10, "CIFAR100": datasets.CIFAR100}[name]
    num_classes = {"CIFAR10": 10, "CIFAR100": 100}[name]
    how_to_get = f'get it with torchvision.datasets.{name}("{root}", download=True)'
    folder = root / layout.base_folder
    if not folder.is_dir():
        raise DataError(f"{root} has no folder {layout.base_folder}; {how_to_get}.")

    meta_path = folder / layout.meta["filename"]
    classes = _read(meta_path, how_to_get).get(layout.meta["key"])
    if not isinstance(classes, list | tuple) or len(classes) != num_classes:
        raise DataError(f"{meta_path} does not name {num_classes} classes; delete it and {how_to_get}.")

    transforms = image_transforms(name, role=role, auto_aug=auto_aug, cutout=cutout)
    parts = []
    for file_list, transform in ((layout.train_list, transforms.train), (layout.test_list, transforms.val)):
        batches = [_read_batch(folder / file_name, num_classes, how_to_get) for file_name, _ in file_list]
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        parts.append(ImagesInMemory(images, labels, transform))
    return Splits(
        name,
        *parts,
        num_classes=num_classes,
        in_channels=3,
        image_size=32,
        events=False,
        classes=tuple(str(_text(class_name)) for class_name in classes),
        finish_train=transforms.finish_train,
        finish_val=transforms.finish_val,
    )
