"""The network that a run's options describe: made for training, and made again with the weights that the run left."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import nn

from seal_fast.models import student, teacher
from seal_fast.train import checkpoint
from seal_fast.train.errors import UsageError
from seal_fast.train.tasks import tau_of

BEST = "best.pt"


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
    options = vars(args)
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    if role_of(options) == "teacher":
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


def read(path: str | Path) -> tuple[dict, Path]:
    """What a run's best.pt holds, and where it lies.

    Args:
        path: The run's folder, or the file.

    Raises:
        UsageError: It is no such file.
    """
    path = Path(path)
    path = path / BEST if path.is_dir() else path
    content = checkpoint.load(path)
    options = content.get("options")
    whole = {"best_net", "epoch", "accuracy"} <= set(content) and isinstance(options, dict)
    if not whole or not {"stu_arch", "arch"} & set(options):
        raise UsageError(f"checkpoint {path} is not the {BEST} of a run: it does not say which network it holds.")
    return content, path


def sizes_of(weights: dict) -> dict[str, int]:
    """Classes and input channels of the network whose weights these are, of which the stem's come first."""
    matrices = [value.shape for value in weights.values() if value.dim() > 1]
    return {"num_classes": matrices[-1][0], "in_channels": matrices[0][1]}


def restored(content: dict, path: Path, args: argparse.Namespace) -> nn.Module:
    """The network of a best.pt with its weights, in evaluation mode.

    Args:
        content: What `read` returned.
        path: Its file, for errors.
        args: Options of the run; of a student they may name another T or other kernels.

    Raises:
        UsageError: The file does not hold the weights of the network that its options describe.
    """
    weights = content["best_net"]
    network = network_of(args, **sizes_of(weights))
    checkpoint.load_into(network, weights, path, f"a {arch_of(vars(args))}")
    return network.eval()


def load(path: str | Path, **changes) -> nn.Module:
    """The network of a run, with the weights of its best epoch, on the CPU and in evaluation mode.

    Args:
        path: The run's folder, or its best.pt.
        changes: Options of a student's run that are to differ, such as T or backend.

    Returns:
        A student: images [B, C, H, W] or events [T, B, C, H, W] -> logits [T, B, K]; or a teacher: images [B, C, H, W]
        -> logits [B, K].

    Raises:
        UsageError: The file is missing, or none that a run of these trainers wrote.
    """
    content, path = read(path)
    unknown = sorted(set(changes) - set(content["options"]))
    if unknown:
        raise TypeError(f"the run in {path} has no option {unknown[0]!r}.")
    return restored(content, path, argparse.Namespace(**{**content["options"], **changes}))
