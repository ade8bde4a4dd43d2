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
from .folders import check_root, held, is_folder, meant, names, not_found
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
        return "move that elsewhere, and they will be made"
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
        raise _not_found(root, classes, missing, recordings, how_to_get)
    number = len(recordings.files)
    if number < _MINIMUM:
        raise DataError(f"{root} has {number} recordings, fewer than {_MINIMUM}; {how_to_get}.")
    whole, shown = _WHOLE[name]
    if number < whole:
        notes.append(f"{root} has {number:,} recordings, where all of {shown} has {whole:,}.")
    return recordings, notes


def _not_found(
    root: Path, classes: tuple[str, ...], missing: list[str], recordings: Recordings, how_to_get: str
) -> DataError:
    """The sentence for classes without recordings: it names the folder under the root where they were looked for."""

    def fits(folder: Path) -> bool:
        return not recordings.files and bool(read_archives(folder, classes, {})[0] or layouts(folder, classes, {}))

    fault = f"has no recordings of {'any class' if len(missing) == len(classes) else ', '.join(missing)}"
    places = [root / name for name in ("extract", "events_np", "download") if is_folder(root / name)]
    for place in (*places, root):
        wrong = next(filter(None, (_in_another_case(place, class_name) for class_name in missing)), None)
        if wrong is not None:
            return DataError(f"{place} {fault}: it holds {wrong}; rename it and others like it.")
    for place in places:
        other = meant(place, fits)
        if other is not None:
            return DataError(
                f"{place} {fault}: {held(place)}; did you mean --data_path {other}, or move {other.name}/* up?"
            )
    if meant(root, fits):
        return not_found(root, fault, how_to_get, fits)
    filled = [place for place in places if names(place)]
    place = recordings.files[0].parent.parent if recordings.files else (*filled, *places, root)[0]
    if is_folder(place / missing[0]):
        return not_found(place / missing[0], "has no recordings", how_to_get)
    return not_found(place, fault, how_to_get)


def _in_another_case(place: Path, class_name: str) -> str | None:
    """The first name that differs from a class's in capital and small letters alone, and what it should be."""
    for name in names(place):
        if name != name.lower() and name.lower() in (class_name, f"{class_name}.zip"):
            return f"{name} instead of {name.lower()}"
    if is_folder(place / class_name):
        for name in names(place / class_name):
            stem, suffix = os.path.splitext(name)
            if suffix != suffix.lower() and suffix.lower() in (".aedat", ".npz"):
                return f"{class_name}/{name} instead of {class_name}/{stem}{suffix.lower()}"
    return None


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
