"""CIFAR10-DVS in SpikingJelly's layout, and simulated recordings of digits in the same one."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.utils.data import random_split

from .aedat import SENSOR
from .archives import read_archives
from .cache import CachedFrames, Recordings, frame_cache
from .camera import write_digits
from .errors import DataError
from .folders import check_root, is_folder, not_found
from .frames import FRAME_SIZE
from .recordings import find, layouts
from .splits import Splits
from .transforms import event_transform

CLASSES = {
    "CIFAR10_DVS_SJ": (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    "DIGITS_DVS": tuple("0123456789"),
}  # fmt: skip
_WHOLE = {"CIFAR10_DVS_SJ": (10_000, "CIFAR10-DVS"), "DIGITS_DVS": (1_797, "DIGITS_DVS")}  # recordings
_MINIMUM = 10  # samples; a tenth of them is held out


def _how_to_get(name: str, root: Path) -> str:
    if name == "DIGITS_DVS":
        return f"move what {root / 'extract'} holds elsewhere, and the recordings will be made"
    return (
        f"put the ten zip files of CIFAR10-DVS (figshare.com, article 4724671; SpikingJelly's page on CIFAR10DVS links "
        f"to them) into {root / 'download'}"
    )


def _complete(name: str, root: Path) -> tuple[Recordings, list[str]]:
    """All recordings, after unpacking or making what is missing, and sentences on them for the user."""
    classes = CLASSES[name]
    how_to_get = _how_to_get(name, root)
    makes = name == "DIGITS_DVS"
    if is_folder(root) or os.path.lexists(root) or not makes:
        check_root(root, how_to_get)
        recordings, missing, notes = find(root, classes)
    else:
        recordings, missing, notes = Recordings(root, (), ()), list(classes), []
    if missing and makes:
        write_digits(root)
        recordings, missing, notes = find(root, classes)
    if missing:
        count = "any class" if len(missing) == len(classes) else ", ".join(missing)
        raise not_found(
            root, f"has no recordings of {count}", how_to_get, lambda folder: _may_be_read(folder, classes, recordings)
        )
    number = len(recordings.files)
    if number < _MINIMUM:
        raise DataError(f"{root} has {number} recordings, fewer than {_MINIMUM}; {how_to_get}.")
    whole, shown = _WHOLE[name]
    if number < whole:
        notes.append(f"{root} has {number:,} recordings, where all of {shown} has {whole:,}.")
    return recordings, notes


def _may_be_read(folder: Path, classes: tuple[str, ...], recordings: Recordings) -> bool:
    """Whether a folder has recordings, where the one that was named has none."""
    return not recordings.files and bool(read_archives(folder, classes, {})[0] or layouts(folder, classes, {}))


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
    recordings, notes = _complete(name, root)
    folder = frame_cache(recordings, time_steps, frame_size)
    number = len(recordings.files)
    shape = (number, time_steps, 2, frame_size, frame_size)
    train, val = random_split(
        range(number), [number - number // 10, number // 10], generator=torch.Generator().manual_seed(42)
    )
    augment = event_transform(flip=name != "DIGITS_DVS", auto_aug=auto_aug, cutout=cutout)
    return Splits(
        name,
        CachedFrames(folder, shape, recordings.labels, train.indices, augment),
        CachedFrames(folder, shape, recordings.labels, val.indices, None),
        num_classes=len(CLASSES[name]),
        in_channels=2,
        image_size=frame_size,
        events=True,
        classes=CLASSES[name],
        notes=tuple(notes),
    )
