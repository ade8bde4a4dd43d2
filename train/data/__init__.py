"""The datasets of the published runs, MNIST, and two small ones made of scikit-learn's digits that need no download."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

from .errors import DataError
from .splits import Splits

__all__ = ["DATASETS", "DataError", "Splits", "canonical", "load"]

# dataset -> the module whose `load` reads it, imported then: what it needs besides torch is not needed before.
_MODULES = {
    "CIFAR10": "cifar",
    "CIFAR100": "cifar",
    "CIFAR10_DVS_SJ": "event_folder",
    "imagenet": "image_folder",
    "MNIST": "mnist",
    "DIGITS": "digits",
    "DIGITS_DVS": "event_folder",
}
DATASETS: tuple[str, ...] = tuple(_MODULES)
_OTHER_NAMES = {"CIFAR10_DVS": "CIFAR10_DVS_SJ"}  # under which the published scripts know a dataset as well


def canonical(name: str) -> str:
    """The name in `DATASETS` of a dataset, which may be given by another name that it has.

    Raises:
        ValueError: there is no such dataset.
    """
    name = _OTHER_NAMES.get(str(name), name)
    if name not in DATASETS:
        by_lower_case = {known.lower(): known for known in (*DATASETS, *_OTHER_NAMES)}
        close = difflib.get_close_matches(str(name).lower(), by_lower_case, n=1)
        hint = f"; did you mean {by_lower_case[close[0]]}?" if close else ""
        raise ValueError(f"must be one of {', '.join(DATASETS)}; got {name!r}{hint}")
    return name


def load(
    name: str,
    root: str | Path | None,
    *,
    role: str,
    time_steps: int,
    auto_aug: bool | None = None,
    cutout: bool | None = None,
    frame_size: int | None = None,
) -> Splits:
    """Check a dataset on disk and return its two parts with the published augmentation.

    Args:
        name: one of `DATASETS`, or CIFAR10_DVS for CIFAR10_DVS_SJ.
        root: folder that holds the data; only DIGITS needs none. DIGITS_DVS creates the folder if it is missing.
        role: "teacher" or "student": whose augmentation the training part gets.
        time_steps: T, the number of frames into which a sample's events are summed; matters to event data only.
        auto_aug: switches AutoAugment (images) or flip, roll, rotation and cutout (events); None takes the published
            choice.
        cutout: switches cutout; None takes the published choice.
        frame_size: H = W of the frames of event data; None for 48, as published.

    Raises:
        ValueError: an argument is none of the above.
        DataError: the data is missing, incomplete, corrupt, or cannot be read.
    """
    try:
        name = canonical(name)
    except ValueError as error:
        raise ValueError(f"name {error}") from None
    if role not in ("teacher", "student"):
        raise ValueError(f"role must be 'teacher' or 'student', not {role!r}")
    if root is None and name == "DIGITS_DVS":
        raise DataError("DIGITS_DVS needs a folder for the recordings that it makes: name one with --data_path.")
    if root is None and name != "DIGITS":
        raise DataError(f"{name} is read from disk: say where it lies with --data_path.")
    try:
        folder = None if root is None else Path(root).expanduser()
    except RuntimeError:
        raise DataError(f"{root} cannot be read: there is no such user.") from None
    options = {"role": role, "time_steps": time_steps, "auto_aug": auto_aug, "cutout": cutout}
    if frame_size is not None:
        if _MODULES[name] != "event_folder":
            raise ValueError(f"frame_size is for event data, which {name} is not")
        options["frame_size"] = frame_size
    return importlib.import_module(f".{_MODULES[name]}", __name__).load(name, folder, **options)
