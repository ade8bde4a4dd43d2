"""CIFAR10-DVS in SpikingJelly's layout, and simulated recordings of digits in the same one."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path, PurePosixPath

import torch
from torch.utils.data import random_split

from .aedat import SENSOR
from .cache import CACHE, CachedFrames, Recordings, frame_cache
from .camera import write_digits
from .errors import DataError
from .frames import FRAME_SIZE
from .publish import one_at_a_time, publish, scratch_folder
from .splits import Splits
from .transforms import event_transform

CLASSES = {
    "CIFAR10_DVS_SJ": (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    "DIGITS_DVS": tuple("0123456789"),
}  # fmt: skip
_MINIMUM = 10  # samples; a tenth of them is held out


def _how_to_get(name: str, root: Path) -> str:
    if name == "DIGITS_DVS":
        return f"delete {root / 'extract'}, and the recordings will be made again"
    return (
        f"put the ten zip files of CIFAR10-DVS (figshare.com, article 4724671; SpikingJelly's page on CIFAR10DVS links "
        f"to them) into {root / 'download'}"
    )


def _files(folder: Path, suffix: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())


def find(root: Path, classes: tuple[str, ...]) -> tuple[Recordings, list[str]]:
    """The recordings under `root`, and the classes that have none.

    Taken from the first of events_np/<class>/*.npz, extract/<class>/*.aedat and <class>/*.aedat that has all classes,
    or else from the one that has most.
    """
    found = []
    for folder, suffix in ((root / "events_np", ".npz"), (root / "extract", ".aedat"), (root, ".aedat")):
        by_class = [_files(folder / class_name, suffix) for class_name in classes]
        missing = [class_name for class_name, files in zip(classes, by_class, strict=True) if not files]
        labels = tuple(label for label, files in enumerate(by_class) for _ in files)
        recordings = Recordings(root, tuple(path for files in by_class for path in files), labels)
        found.append((recordings, missing))
    return min(found, key=lambda candidate: len(candidate[1]))


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file whose members must all stay inside the folder."""
    mend = "delete it and download it again"
    try:
        with zipfile.ZipFile(archive) as content:
            for member in content.namelist():
                path = PurePosixPath(member.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in member:
                    raise DataError(f"{archive} wants to unpack {member!r} outside its folder; {mend}.")
            content.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{archive} is truncated or corrupt ({type(error).__name__}); {mend}.") from None


def unpack_downloads(root: Path, classes: tuple[str, ...]) -> None:
    """Unpack download/<class>.zip to extract/<class>, for the classes that have the one and lack the other.

    Raises:
        DataError: an archive is corrupt, holds other folders or reaches outside, or there is no room to unpack it.
    """
    for class_name in classes:
        archive = root / "download" / f"{class_name}.zip"
        if archive.is_file() and not _files(root / "extract" / class_name, ".aedat"):
            with scratch_folder(root) as scratch:
                _unpack(archive, scratch)
                if not _files(scratch / class_name, ".aedat"):
                    raise DataError(f"{archive} holds no {class_name}/*.aedat files; delete it and download it again.")
                publish(scratch / class_name, root / "extract" / class_name)


def _complete(name: str, root: Path) -> Recordings:
    """All recordings, after unpacking or making what is missing."""
    classes = CLASSES[name]
    how_to_get = _how_to_get(name, root)
    if name == "CIFAR10_DVS_SJ" and not root.is_dir():
        raise DataError(f"{root} is missing; create it and {how_to_get}.")
    recordings, missing = find(root, classes)
    if missing and (name == "DIGITS_DVS" or (root / "download").is_dir()):
        with one_at_a_time(root / CACHE):
            recordings, missing = find(root, classes)
            if missing:
                unpack_downloads(root, classes) if name == "CIFAR10_DVS_SJ" else write_digits(root)
                recordings, missing = find(root, classes)
    if missing:
        count = "any class" if len(missing) == len(classes) else ", ".join(missing)
        raise DataError(f"{root} has no recordings of {count}; {how_to_get}.")
    if len(recordings.files) < _MINIMUM:
        raise DataError(f"{root} has {len(recordings.files)} recordings, fewer than {_MINIMUM}; {how_to_get}.")
    return recordings


def load(
    name: str,
    root: Path,
    *,
    role: str,
    time_steps: int,
    auto_aug: bool | None = None,
    cutout: bool | None = None,
    frame_size: int = FRAME_SIZE,
) -> Splits:
    """CIFAR10_DVS_SJ or DIGITS_DVS under `root`; the arguments are those of `seal_fast.train.data.load`.

    The published split: one sample in ten held out, drawn with the generator seed 42. Both roles get the same
    augmentation.
    """
    if not isinstance(time_steps, int) or time_steps < 1:
        raise ValueError(f"time_steps must be a whole number of at least 1, not {time_steps!r}")
    if not isinstance(frame_size, int) or not 1 <= frame_size <= SENSOR:
        raise ValueError(f"frame_size must be a whole number from 1 to {SENSOR}, not {frame_size!r}")
    recordings = _complete(name, root)
    folder = frame_cache(recordings, time_steps, frame_size)
    number = len(recordings.files)
    train, val = random_split(
        range(number), [number - number // 10, number // 10], generator=torch.Generator().manual_seed(42)
    )
    augment = event_transform(flip=name != "DIGITS_DVS", auto_aug=auto_aug, cutout=cutout)
    return Splits(
        name,
        CachedFrames(folder, train.indices, augment),
        CachedFrames(folder, val.indices, None),
        num_classes=len(CLASSES[name]),
        in_channels=2,
        image_size=frame_size,
        events=True,
        classes=CLASSES[name],
    )
