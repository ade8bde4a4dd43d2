"""The network that a run's options describe: made for training, and made again with the weights that the run left."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from seal_fast.models import student, teacher
from seal_fast.train import checkpoint, data, ranks
from seal_fast.train.errors import UsageError
from seal_fast.train.options import distill_parser, fill_in, potential, teacher_parser
from seal_fast.train.tasks import tau_of


def role_of(options: dict) -> str:
    """Whose options these are: "student" or "teacher"."""
    return "student" if "stu_arch" in options else "teacher"


def arch_of(options: dict) -> str:
    """The architecture that is trained."""
    return options["stu_arch"] if role_of(options) == "student" else options["arch"]


def stem_of(dataset: str, arch: str) -> str:
    """The stem of a teacher for a dataset: ImageNet's at 224 pixels, whatever the number of classes."""
    return "imagenet" if dataset == "imagenet" and arch not in ("resnet8", "resnet19") else "cifar"


def network_of(args: argparse.Namespace, *, num_classes: int, in_channels: int) -> nn.Module:
    """A network with fresh weights, for a dataset of so many classes and channels."""
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


def initial_network(args: argparse.Namespace, *, num_classes: int, in_channels: int) -> nn.Module:
    """The network that a run starts from: with fresh weights, or with those that --init_from names.

    A run that is resumed by name has its own, and --init_from is not read.

    Raises:
        UsageError: --init_from holds another network.
    """
    network = network_of(args, num_classes=num_classes, in_channels=in_channels)
    if args.init_from is not None and args.resume in (None, "auto"):
        path, arch = checkpoint.best_of(args.init_from), arch_of(vars(args))
        kept = checkpoint.start_from(network, path, f"a {arch} for {in_channels} input channels")
        anew = f"; {' and '.join(kept)} start anew, for {num_classes} classes" if kept else ""
        ranks.say(f"--init_from: weights of {path}{anew}.")
    return network


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
        epoch: Of how many epochs the weights are; None where the file does not say.
        accuracy: On the validation part after that epoch; None where the file does not say.

    Raises:
        UsageError: It is no such file, or is described as something else than it is.
    """

    def __init__(self, path: str | Path, **described):
        self.path = checkpoint.best_of(path)
        content = checkpoint.load(self.path)
        self._weights = checkpoint.weights_of(content)
        described = {name: value for name, value in described.items() if value is not None}
        if "dataset" in described:
            described["dataset"] = data.canonical(described["dataset"])
        if "v_reset" in described:
            described["v_reset"] = potential(described["v_reset"])
        try:
            if "options" in content:
                self._read_own(content, described)
            else:
                self._read_published(content, described)
            matrices = checkpoint.matrices_of(self._weights)
            # From the stem's to the classifier's.
            self.num_classes, self.in_channels = matrices[-1].shape[0], matrices[0].shape[1]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, UsageError):
                raise
            what = f"is not the {checkpoint.BEST} of a run: it does not say which network it holds"
            hint = "of one by the published code, --stu_arch or --arch says so, and --dataset"
            raise UsageError(f"checkpoint {self.path} {what} ({hint}).") from None

    def _read_own(self, content: dict, described: dict) -> None:
        options = content["options"]
        self.role = role_of(options)
        arch_of(options)
        parser = distill_parser() if self.role == "student" else teacher_parser()
        self.options = {**vars(parser.parse_args(["--dataset", options["dataset"]])), **options}
        for name, value in described.items():
            if self.options.get(name) != value:
                raise UsageError(f"--{name} is {value}; the run in {self.path} has {self.options.get(name)}.")
        self.epoch, self.accuracy = int(content["epoch"]), float(content["accuracy"])

    def _read_published(self, content: dict, described: dict) -> None:
        self.role = role_of(described)
        arch_of(described)
        parser = distill_parser() if self.role == "student" else teacher_parser()
        args = parser.parse_args(["--dataset", described["dataset"]])
        unknown = [name for name in described if not hasattr(args, name)]
        if unknown:
            raise UsageError(f"--{unknown[0]} is for students; {self.path} is said to hold a {self.role}.")
        vars(args).update(described)
        fill_in(args, role=self.role)
        if self.role == "student":
            args.v_reset = potential(args.v_reset)
        self.options = vars(args)
        self.epoch = int(content["best_epoch"]) if "best_epoch" in content else None
        self.accuracy = float(content["best_acc"]) / 100 if "best_acc" in content else None  # published in per cent

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
        checkpoint.load_into(network, self._weights, self.path, f"a {arch_of(vars(args))}")
        return network.eval()


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
