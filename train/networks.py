"""The network that a run's options describe: made for training, and made again with the weights that the run left."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from torch import nn

from seal_fast.models import student, teacher
from seal_fast.models.ann import WITHOUT_STEMS
from seal_fast.train import checkpoint, ranks
from seal_fast.train.checks import potential
from seal_fast.train.defaults import dataset_of, fill_in
from seal_fast.train.errors import UsageError
from seal_fast.train.options import distill_parser, teacher_parser
from seal_fast.train.tasks import tau_of


def role_of(options: dict) -> str:
    """Whose options these are: "student" or "teacher"."""
    return "student" if "stu_arch" in options else "teacher"


def arch_of(options: dict) -> str:
    """The architecture that is trained."""
    return options["stu_arch"] if role_of(options) == "student" else options["arch"]


def stem_of(dataset: str, arch: str) -> str:
    """The stem of a teacher for a dataset: ImageNet's at 224 pixels, whatever the number of classes."""
    return "imagenet" if dataset == "imagenet" and arch not in WITHOUT_STEMS else "cifar"


def network_of(args: argparse.Namespace, *, num_classes: int, in_channels: int) -> nn.Module:
    """A network with fresh weights, for data of this number of classes and channels."""
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    if role_of(vars(args)) == "teacher":
        return teacher(args.arch, **sizes, stem=stem_of(args.dataset, args.arch))
    return student(
        args.stu_arch,
        **sizes,
        time_steps=args.T,
        tau=tau_of(args.decay),
        v_threshold=args.thresh,
        v_reset=args.v_reset,
        detach_reset=args.detach_reset,
        backend=args.backend,
    )


def load_start(network: nn.Module, args: argparse.Namespace) -> None:
    """Give a fresh network the weights that --init_from names; the first rank reads them.

    Raises:
        UsageError: It names no checkpoint, or one of another network.
    """
    path, options = checkpoint.best_of(args.init_from), vars(args)
    state, arch = checkpoint.weights_of(ranks.from_first(checkpoint.load, path)), arch_of(options)
    readout = checkpoint.start_from(network, state, path, f"a {arch} for this data", **_asked(role_of(options), arch))
    anew = f"; {' and '.join(readout)} start anew, for another number of classes" if readout else ""
    ranks.say(f"--init_from: weights of {path}{anew}.")


def _asked(role: str, arch: str) -> dict[str, str]:
    """The network that is asked for, as `checkpoint.load_into` takes it."""
    return {"role": role, "arch": arch, "flag": "--stu_arch" if role == "student" else "--arch"}


class Trained:
    """What a run left of its best epoch.

    A checkpoint of the published code holds the weights alone, so whoever reads it says the rest.

    Args:
        path: The run's folder, its best.pt, or the model_weights.pth of the published code.
        described: Options of that run by name. Of a published checkpoint: `stu_arch` or `arch`, and `dataset`; T,
            decay, thresh and v_reset have the dataset's defaults. Those of a run of these trainers are in its file.

    Attributes:
        path: The file.
        options: Of the run, resolved; what is newer than the run has its default.
        role: "student" or "teacher".
        num_classes, in_channels: Of its network.
        epoch: The epoch that the weights are from, counted from 1; None where the file does not say.
        accuracy: On the validation part after that epoch; None where the file does not say.

    Raises:
        UsageError: It is no such file, or is described as something else than it is.
    """

    def __init__(self, path: str | Path, **described):
        self.path = checkpoint.best_of(path)
        content = checkpoint.load(self.path)
        self._weights = checkpoint.weights_of(content)
        described = {name: value for name, value in described.items() if value is not None}
        if "v_reset" in described:
            described["v_reset"] = potential(described["v_reset"])
        if "options" in content:
            self._read_own(content, described)
        else:
            self._read_published(content, described)
        matrices = checkpoint.matrices_of(self._weights)
        if not matrices:
            raise UsageError(f"checkpoint {self.path} holds no weights of a network.")
        # Where the file does not say: from the stem's to the classifier's.
        self.num_classes = _size(content, "num_classes", matrices[-1].shape[0])
        self.in_channels = _size(content, "in_channels", matrices[0].shape[1])

    def _read_own(self, content: dict, described: dict) -> None:
        options = content["options"]
        try:
            self.role = role_of(options)
            arch_of(options)  # raises KeyError where there is none
            parser = distill_parser() if self.role == "student" else teacher_parser()
            self.options = {**vars(parser.parse_args(["--dataset", options["dataset"]])), **options}
            self.epoch, self.accuracy = int(content["epoch"]), float(content["accuracy"])
        except (KeyError, TypeError, ValueError):
            what = f"is not the {checkpoint.BEST} of a run: it does not say which network it holds"
            raise UsageError(f"checkpoint {self.path} {what}.") from None
        if "dataset" in described:
            described = {**described, "dataset": dataset_of(described["dataset"])}
        for name, value in described.items():
            if self.options.get(name) != value:
                raise UsageError(f"--{name} is {value}; the run in {self.path} has {self.options.get(name)}.")

    def _read_published(self, content: dict, described: dict) -> None:
        named = [name for name in ("stu_arch", "arch") if name in described]
        if len(named) != 1 or "dataset" not in described:
            how = "with --dataset, and either --stu_arch for a student or --arch for a teacher"
            raise UsageError(f"checkpoint {self.path} does not say which network it holds: describe it {how}.")
        self.role = role_of(described)
        parser = distill_parser() if self.role == "student" else teacher_parser()
        args = parser.parse_args(["--dataset", described["dataset"]])
        unknown = [name for name in described if not hasattr(args, name)]
        if unknown:
            raise UsageError(f"--{unknown[0]} is for students; {self.path} is said to hold a teacher.")
        vars(args).update(described)
        fill_in(args, role=self.role)
        if self.role == "student":
            args.v_reset = potential(args.v_reset)
        self.options = vars(args)
        epoch, accuracy = (_number(content.get(name)) for name in ("best_epoch", "best_acc"))
        self.epoch = None if epoch is None else int(epoch) + 1  # published from 0
        self.accuracy = None if accuracy is None else accuracy / 100  # published in per cent

    def network(self, args: argparse.Namespace) -> nn.Module:
        """The network in evaluation mode, on the CPU.

        Args:
            args: The run's options; of a student, T and backend may differ.

        Raises:
            UsageError: The file does not hold the weights of the network that the options describe.
        """
        try:
            network = network_of(args, num_classes=self.num_classes, in_channels=self.in_channels)
        except (TypeError, ValueError) as error:
            raise UsageError(f"checkpoint {self.path} holds no network that can be made here: {error}") from error
        arch = arch_of(vars(args))
        checkpoint.load_into(network, self._weights, self.path, f"a {arch}", **_asked(self.role, arch))
        return network.eval()


def _size(content: dict, name: str, otherwise: int) -> int:
    size = content.get(name)
    return size if isinstance(size, int) and size > 0 else otherwise


def _number(value: object) -> float | None:
    """A finite number of a checkpoint; None where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is for a tensor of several values
        return None
    return number if math.isfinite(number) else None


def load(
    path: str | Path,
    *,
    T: int | None = None,
    backend: str | None = None,
    stu_arch: str | None = None,
    arch: str | None = None,
    dataset: str | None = None,
    decay: float | None = None,
    thresh: float | None = None,
    v_reset: float | str | None = None,
) -> nn.Module:
    """The network of a run, with the weights of its best epoch, on the CPU and in evaluation mode.

    Args:
        path: The run's folder, its best.pt, or the model_weights.pth of the published code.
        T: Time steps of a student, instead of those of its training.
        backend: Kernels of a student, instead of those of its training.
        stu_arch: Of a published checkpoint, the student that it holds.
        arch: Of a published checkpoint, the teacher that it holds.
        dataset: Of a published checkpoint, the data set that it was trained on, as `--dataset` has it.
        decay: Of a published student, the membrane decay; None for the data set's default, as for `T`.
        thresh: Of a published student, the firing threshold; None for 1.
        v_reset: Of a published student, the potential after a spike, or "none" for soft reset; None for 0.

    Returns:
        A student: images [B, C, H, W] or events [T, B, C, H, W] -> logits [T, B, K]; or a teacher: images [B, C, H, W]
        -> logits [B, K].

    Raises:
        UsageError: The file is missing, or neither of these trainers nor of the published code.
        ValueError: A teacher has neither T nor backend.
    """
    described = {"stu_arch": stu_arch, "arch": arch, "dataset": dataset}
    trained = Trained(path, **described, decay=decay, thresh=thresh, v_reset=v_reset)
    changes = {name: value for name, value in {"T": T, "backend": backend}.items() if value is not None}
    if changes and trained.role == "teacher":
        raise ValueError(f"{next(iter(changes))} is for students; {trained.path} holds a teacher.")
    return trained.network(argparse.Namespace(**{**trained.options, **changes}))
