"""The network that a run's options describe: made for training, and made again with the weights that the run left."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from seal_fast.models import student, teacher
from seal_fast.train import checkpoint
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


class Trained:
    """What a run left of its best epoch.

    Args:
        path: The run's folder, or its best.pt.

    Attributes:
        path: The file.
        options: Of the run, resolved; what is newer than the run has its default.
        role: "student" or "teacher".
        num_classes, in_channels: Of its network.
        epoch: Of how many epochs the weights are.
        accuracy: On the validation part after that epoch.

    Raises:
        UsageError: It is no such file.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.path = path / checkpoint.BEST if path.is_dir() else path
        content = checkpoint.load(self.path)
        self._weights, options = content.get("best_net"), content.get("options")
        matrices = checkpoint.matrices_of(self._weights)
        try:
            self.role = role_of(options)
            arch_of(options)
            parser = distill_parser() if self.role == "student" else teacher_parser()
            self.options = {**vars(parser.parse_args(["--dataset", options["dataset"]])), **options}
            self.epoch, self.accuracy = int(content["epoch"]), float(content["accuracy"])
            # From the stem's to the classifier's.
            self.num_classes, self.in_channels = matrices[-1].shape[0], matrices[0].shape[1]
        except (KeyError, TypeError, ValueError, IndexError):
            what = f"is not the {checkpoint.BEST} of a run: it does not say which network it holds"
            raise UsageError(f"checkpoint {self.path} {what}.") from None

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


def load(path: str | Path, *, T: int | None = None, backend: str | None = None) -> nn.Module:
    """The network of a run, with the weights of its best epoch, on the CPU and in evaluation mode.

    Args:
        path: The run's folder, or its best.pt.
        T: Time steps of a student, instead of those of its training.
        backend: Kernels of a student, instead of those of its training.

    Returns:
        A student: images [B, C, H, W] or events [T, B, C, H, W] -> logits [T, B, K]; or a teacher: images [B, C, H, W]
        -> logits [B, K].

    Raises:
        UsageError: The file is missing, or none that a run of these trainers wrote.
        ValueError: A teacher has neither T nor backend.
    """
    trained = Trained(path)
    changes = {name: value for name, value in {"T": T, "backend": backend}.items() if value is not None}
    if changes and trained.role == "teacher":
        raise ValueError(f"{next(iter(changes))} is for students; {trained.path} holds a teacher.")
    return trained.network(argparse.Namespace(**{**trained.options, **changes}))
