"""CIFAR-10 and CIFAR-100 in the layout in which torchvision unpacks them."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import reprlib
import shlex
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError
from .folders import check_root, is_file, is_folder, not_found, unreadable
from .in_memory import ImagesInMemory
from .splits import Splits
from .transforms import image_transforms


class _Layout(NamedTuple):
    """Names of the unpacked Python version, and where the labels and their names are in its files."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    names: str
    labels: str
    num_classes: int


_LAYOUTS = {
    "CIFAR10": _Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "label_names",
        "labels",
        10,
    ),
    "CIFAR100": _Layout("cifar-100-python", ("train",), ("test",), "meta", "fine_label_names", "fine_labels", 100),
}


_OTHER_VERSIONS = {
    "-batches-bin": "binary",
    "-binary": "binary",
    "-binary.tar.gz": "binary",
    "-batches-mat": "MATLAB",
    "-matlab": "MATLAB",
    "-matlab.tar.gz": "MATLAB",
}


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


def _scalar(dtype: Any, content: Any) -> Any:
    """A numpy number or text, as labels and names may be; of Python objects, `_dtype` has made none."""
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iufUS" or len(content) != dtype.itemsize:
        raise _ForbiddenError("a numpy scalar that is neither a number nor text")
    return np.ndarray((), dtype, content)[()]


def _from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """What protocol 5 stores a contiguous array as."""
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _empty_bytes() -> bytes:
    """What protocols up to 2 ask `bytes` for."""
    return b""


def _path(*parts: str) -> None:
    """What stands in for a `pathlib` path, as names of files may be; they are not read."""


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
        ("numpy.core.multiarray", "scalar"): _scalar,
        ("numpy._core.multiarray", "scalar"): _scalar,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy._core.numeric", "_frombuffer"): _from_buffer,
        ("_codecs", "encode"): _encode,
        ("__builtin__", "bytes"): _empty_bytes,
        ("collections", "OrderedDict"): OrderedDict,
        **{
            (module, f"{pure}{system}Path"): _path
            for module in ("pathlib", "pathlib._local")
            for pure in ("", "Pure")
            for system in ("Posix", "Windows")
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise _ForbiddenError(f"{module}.{name}")
        return self._admitted[module, name]


def _check_memo(content: bytes) -> None:
    """Refuse places in the unpickler's memo that no pickle of this size uses: it makes room up to the highest.

    Raises:
        ValueError: there is one, or the pickle is broken.
    """
    for code, argument, _ in pickletools.genops(content):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError(f"place {argument} in the memo of a pickle of {len(content)} bytes")


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _read(path: Path, how_to_get: str) -> dict[str, Any]:
    try:
        packed = path.read_bytes()
        _check_memo(packed)
        content = _ArrayUnpickler(io.BytesIO(packed), encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {how_to_get}.") from None
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from None
    except _ForbiddenError as error:
        raise DataError(
            f"{path} asks for {error} where arrays and labels belong, so it was not read; save it again with a plain "
            "dict, lists and arrays."
        ) from None
    except Exception as error:  # a broken pickle stream can raise anything
        raise DataError(
            f"{path} is truncated or corrupt ({type(error).__name__}); delete it and {how_to_get}."
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, where a dict of images and labels is expected.")
    return {_text(key): value for key, value in content.items()}


def _shown(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {list(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _read_batch(path: Path, layout: _Layout, how_to_get: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,32,32,3] and labels int64 [N]."""
    entry = _read(path, how_to_get)
    data = entry.get("data")
    labels = entry.get("fine_labels", entry.get("labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"{path} holds {_shown(data)} as data, where images as uint8 [N, 3072] are expected.")
    if isinstance(labels, np.ndarray) and labels.ndim == 1:
        labels = labels.tolist()
    if not isinstance(labels, list | tuple):
        raise DataError(f"{path} holds {_shown(labels)} as labels, where a list of whole numbers is expected.")
    for label in labels:
        if not isinstance(label, int | np.integer):
            shown = " ".join(reprlib.repr(label).split())
            raise DataError(f"{path} holds the label {shown}, where whole numbers are expected.")
    if len(labels) != len(data) or not len(data):
        raise DataError(
            f"{path} holds {len(data)} images and {len(labels)} labels, where one label for each image is expected."
        )
    if min(labels) < 0 or max(labels) >= layout.num_classes:
        wrong = min(labels) if min(labels) < 0 else max(labels)
        raise DataError(f"{path} holds the label {wrong}, outside 0 to {layout.num_classes - 1}.")
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.asarray(labels, dtype=np.int64)


def _holds_batches(folder: Path, layout: _Layout) -> bool:
    return is_folder(folder) and any(is_file(folder / name) for name in (layout.meta, *layout.train, *layout.test))


def _folder(name: str, root: Path, layout: _Layout) -> tuple[Path, str]:
    """The folder of the batches, and how to get them."""

    def how_to_get(parent: Path) -> str:
        return f'get it with torchvision.datasets.{name}("{parent}", download=True)'

    if is_folder(root / layout.folder):
        return root / layout.folder, how_to_get(root)
    if _holds_batches(root, layout):  # torchvision gives their folder its own name
        return root, how_to_get(root.parent if root.name == layout.folder else root)
    advice = how_to_get(root)
    version = layout.folder.removesuffix("-batches-py").removesuffix("-python")  # cifar-10 or cifar-100
    packed = root / f"{version}-python.tar.gz"
    other = next((suffix for suffix in _OTHER_VERSIONS if os.path.lexists(root / f"{version}{suffix}")), None)
    if is_file(packed):
        advice = f"unpack it with: tar -xzf {shlex.quote(str(packed))} -C {shlex.quote(str(root))}"
    elif other is not None:
        advice = f"{version}{other} is the {_OTHER_VERSIONS[other]} version, and the Python version is read: {advice}"
    raise not_found(root, f"has no folder {layout.folder}", advice, lambda folder: _fits(folder, layout))


def _fits(folder: Path, layout: _Layout) -> bool:
    return is_folder(folder / layout.folder) or _holds_batches(folder, layout)


def load(
    name: str, root: Path, *, role: str, time_steps: int, auto_aug: bool | None = None, cutout: bool | None = None
) -> Splits:
    """CIFAR10 or CIFAR100 under `root`; the arguments are those of `seal_fast.train.data.load`.

    `root` is the folder of the batches or the one around it. Checksums are not compared, so that a part of the set can
    stand in for the whole.
    """
    layout = _LAYOUTS[name]
    check_root(root, f'get it with torchvision.datasets.{name}("{root}", download=True)')
    folder, how_to_get = _folder(name, root, layout)

    meta_path = folder / layout.meta
    classes = _read(meta_path, how_to_get).get(layout.names)
    if not isinstance(classes, list | tuple) or len(classes) != layout.num_classes:
        held = f"{len(classes)} names" if isinstance(classes, list | tuple) else _shown(classes)
        raise DataError(
            f"{meta_path} holds {held} as {layout.names}, where {layout.num_classes} names of classes are expected."
        )

    transforms = image_transforms(name, role=role, auto_aug=auto_aug, cutout=cutout)
    parts = []
    for files, transform in ((layout.train, transforms.train), (layout.test, transforms.val)):
        batches = [_read_batch(folder / file_name, layout, how_to_get) for file_name in files]
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        parts.append(ImagesInMemory(images, labels, transform))
    return Splits(
        name,
        *parts,
        num_classes=layout.num_classes,
        in_channels=3,
        image_size=32,
        events=False,
        classes=tuple(str(_text(class_name)) for class_name in classes),
        finish_train=transforms.finish_train,
        finish_val=transforms.finish_val,
    )
