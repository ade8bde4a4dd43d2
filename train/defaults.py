"""What the options of a run are where the command leaves them out: values of each dataset's family."""

from __future__ import annotations

import argparse

from seal_fast.train import data
from seal_fast.train.errors import UsageError

_SHARED = {"alpha": 0.6, "beta": 0.15, "wd": 5e-4, "lr": 0.1}
_CIFAR = {
    **_SHARED,
    "num_epoch": 300,
    "batch_size": 128,
    "T": 4,
    "decay": 0.5,
    "student": "resnet18",
    "teacher": "resnet34",
}
_DVS = {**_CIFAR, "batch_size": 32, "T": 10, "teacher": "resnet19"}
_IMAGENET = {**_CIFAR, "num_epoch": 100, "batch_size": 512, "decay": 0.2, "student": "preact_resnet34"}
_DIGITS = {**_CIFAR, "num_epoch": 10, "batch_size": 64, "student": "resnet8", "teacher": "resnet8"}

# dataset -> (defaults of a teacher's run, defaults of a student's run). Those of CIFAR, CIFAR10-DVS and ImageNet are
# what the six published commands of SeAl-KD (arXiv 2605.14252) say; batches of 128 for the teacher of CIFAR10-DVS are
# its script's. MNIST's are CIFAR's, as in the published scripts; those of the digits are this project's own.
DEFAULTS: dict[str, tuple[dict, dict]] = {
    "CIFAR10": (_CIFAR, _CIFAR),
    "CIFAR100": (_CIFAR, _CIFAR),
    "MNIST": (_CIFAR, _CIFAR),
    "CIFAR10_DVS_SJ": ({**_DVS, "batch_size": 128, "lr": 0.2}, _DVS),
    "imagenet": ({**_IMAGENET, "wd": 1e-4}, {**_IMAGENET, "lr": 0.2, "wd": 2e-5}),
    "DIGITS": (_DIGITS, _DIGITS),
    "DIGITS_DVS": (_DIGITS, _DIGITS),
}


def table(role: str) -> str:
    """The defaults of each dataset's family, for --help."""
    lines = ["defaults per dataset:"]
    for name, both in DEFAULTS.items():
        own = both[role == "student"]
        keys = ("student", "teacher", "T", "batch_size", "num_epoch", "lr", "wd", "decay")
        shown = [f"{key} {own[key]}" for key in keys if role == "student" or key not in ("student", "decay")]
        lines.append(f"  {name:<15} {', '.join(shown)}")
    return "\n".join(lines)


def fill_in(args: argparse.Namespace, *, role: str) -> None:
    """Give what was left open the defaults of the dataset's family.

    Raises:
        UsageError: There is no such data set, or none is named.
    """
    if args.dataset is None:
        raise UsageError(f"--dataset is needed: one of {', '.join(DEFAULTS)}; --resume PATH takes that of its run.")
    args.dataset = dataset_of(args.dataset)
    defaults = DEFAULTS[args.dataset][role == "student"]
    renamed = {"student": ("stu_arch",), "batch_size": ("train_batch_size", "val_batch_size")}
    renamed["teacher"] = ("tea_arch",) if role == "student" else ("arch",)
    for key, value in defaults.items():
        for name in renamed.get(key, (key,)):
            if getattr(args, name, value) is None:
                setattr(args, name, value)


def dataset_of(name: str) -> str:
    """The data set that --dataset names.

    Raises:
        UsageError: There is no such data set.
    """
    try:
        return data.canonical(name)
    except ValueError as error:
        sentence = f"--dataset {error}"
        raise UsageError(sentence if sentence.endswith("?") else f"{sentence}.") from None
