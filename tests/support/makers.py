"""Small data sets in the real formats on disk."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from seal_fast.train.data import camera
from seal_fast.train.data.aedat import Events, read_aedat, write_aedat

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DVS_CLASSES = CIFAR10_CLASSES


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its str, in which the published CIFAR files hold keys and pixels."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def _pickled(entry: dict, style: str) -> bytes:
    if style == "str":
        return pickle.dumps({key.decode(): value for key, value in entry.items()}, protocol=4)
    if style == "bytes":
        return pickle.dumps(entry, protocol=2)
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(entry)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def _images(
    generator: np.random.Generator, number: int, num_classes: int, pixels: int = 3072
) -> tuple[np.ndarray, list[int]]:
    """Images, as rows of so many numbers, whose brightness tells their class, so that a network can learn them."""
    labels = generator.permutation(np.arange(number) % num_classes)
    level = (labels + 0.5) * 256 / num_classes
    noise = generator.normal(0, 8, (number, pixels))
    return np.clip(level[:, None] + noise, 0, 255).astype(np.uint8), labels.tolist()


def cifar10(root: str | Path, per_batch: int = 8, seed: int = 0, style: str = "python2") -> Path:
    """Write root/cifar-10-batches-py with `per_batch` images in each of its six batches.

    Style "python2" is the published one; "bytes" and "str" are what Python 3 writes with such keys.
    """
    folder = Path(root) / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        data, labels = _images(generator, per_batch, 10)
        entry = {
            b"batch_label": f"batch {name}".encode(),
            b"labels": labels,
            b"data": data,
            b"filenames": [b"image_%d.png" % number for number in range(per_batch)],
        }
        (folder / name).write_bytes(_pickled(entry, style))
    meta = {b"num_cases_per_batch": per_batch, b"label_names": [name.encode() for name in CIFAR10_CLASSES]}
    (folder / "batches.meta").write_bytes(_pickled(meta, style))
    return Path(root)


def cifar100(root: str | Path, train: int = 40, test: int = 8, seed: int = 0, style: str = "python2") -> Path:
    """Write root/cifar-100-python with so many images in train and test."""
    folder = Path(root) / "cifar-100-python"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for name, number in (("train", train), ("test", test)):
        data, labels = _images(generator, number, 100)
        entry = {
            b"fine_labels": labels,
            b"coarse_labels": [label // 5 for label in labels],
            b"data": data,
            b"filenames": [b"image_%d.png" % index for index in range(number)],
            b"batch_label": name.encode(),
        }
        (folder / name).write_bytes(_pickled(entry, style))
    meta = {
        b"fine_label_names": [b"fine_%d" % label for label in range(100)],
        b"coarse_label_names": [b"coarse_%d" % label for label in range(20)],
    }
    (folder / "meta").write_bytes(_pickled(meta, style))
    return Path(root)


def idx(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(
    root: str | Path,
    train: int = 40,
    test: int = 10,
    seed: int = 0,
    folder: str = "MNIST/raw",
    compressed: bool = False,
) -> Path:
    """Write MNIST's four files, with so many images in train and t10k, to root/folder, plain or as .gz."""
    target = Path(root) / folder
    target.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for part, number in (("train", train), ("t10k", test)):
        pixels, labels = _images(generator, number, 10, 28 * 28)
        arrays = {"images-idx3": pixels.reshape(-1, 28, 28), "labels-idx1": np.array(labels, np.uint8)}
        for kind, array in arrays.items():
            path = target / f"{part}-{kind}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    return Path(root)


def random_events(generator: np.random.Generator, number: int) -> Events:
    """Events anywhere on the sensor, in the order of their times."""
    t = np.sort(generator.integers(0, 10**6, number))
    x, y = generator.integers(0, 128, (2, number))
    return Events(t=t, x=x, y=y, p=generator.integers(0, 2, number))


def cifar10_dvs(
    root: str | Path, per_class: int = 2, events: int = 300, seed: int = 0, layout: str = "extract"
) -> Path:
    """Write CIFAR10-DVS recordings.

    Layout "extract" is root/extract/<class>/*.aedat, "flat" root/<class>/*.aedat, "events_np"
    root/events_np/<class>/*.npz, and "download" root/download/<class>.zip.
    """
    root = Path(root)
    generator = np.random.default_rng(seed)
    folder = root if layout == "flat" else root / "extract"
    for class_name in DVS_CLASSES:
        (folder / class_name).mkdir(parents=True)
        for number in range(per_class):
            path = folder / class_name / f"cifar10_{class_name}_{number}.aedat"
            write_aedat(path, random_events(generator, events))
    if layout == "events_np":
        for path in folder.glob("*/*.aedat"):
            target = root / "events_np" / path.parent.name / f"{path.stem}.npz"
            target.parent.mkdir(parents=True, exist_ok=True)
            np.savez(target, **read_aedat(path)._asdict())
    if layout == "download":
        (root / "download").mkdir()
        for class_name in DVS_CLASSES:
            with zipfile.ZipFile(root / "download" / f"{class_name}.zip", "w") as archive:
                for path in (folder / class_name).iterdir():
                    archive.write(path, f"{class_name}/{path.name}")
    if layout in ("events_np", "download"):
        shutil.rmtree(folder)
    return root


def image_folder(
    root: str | Path, classes: int = 2, per_class: int = 3, size: tuple[int, int] = (48, 40), seed: int = 0
) -> Path:
    """Write JPEGs of `size` (width, height) to root/{train,val}/<class>/."""
    root = Path(root)
    generator = np.random.default_rng(seed)
    for part in ("train", "val"):
        for label in range(classes):
            folder = root / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(per_class):
                level = (label + 0.5) * 256 / classes
                pixels = np.clip(generator.normal(level, 16, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{part}_{number}.JPEG")
    return root


# dataset -> what writes a small one
SETS = {
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "CIFAR10_DVS_SJ": cifar10_dvs,
    "imagenet": image_folder,
    "MNIST": mnist,
    "DIGITS": lambda root: root,
    "DIGITS_DVS": lambda root: camera.write_digits(root, per_class=1),
}
