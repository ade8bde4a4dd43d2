"""Evaluate what a run has trained: `seal-fast-evaluate RUN --data_path D`.

A checkpoint of the published code does not say what it holds: `--stu_arch resnet18 --dataset CIFAR10` do.
Also runs as `python train/evaluate.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from seal_fast.backends import BACKENDS
from seal_fast.models import STUDENTS, TEACHERS
from seal_fast.train import data, disk, ranks
from seal_fast.train.checks import kernels_of, memory_format, smallest_part
from seal_fast.train.command import command
from seal_fast.train.engine import evaluate
from seal_fast.train.errors import UsageError
from seal_fast.train.feed import Feed
from seal_fast.train.networks import Trained, arch_of
from seal_fast.train.options import AMP, Parser
from seal_fast.train.run import prepare, splits_of, val_loader_of
from seal_fast.train.tasks import DistillTask, TeacherTask

# What a checkpoint of the published code does not say of itself.
DESCRIBED = ("stu_arch", "arch", "dataset", "decay", "thresh", "v_reset")


def run(args: argparse.Namespace) -> dict:
    """Evaluate the network that the options name on the validation part of its dataset.

    Returns:
        checkpoint, dataset, samples; accuracy, accuracy_at t = 1…T, and firing_rate by layer.
    """
    trained = Trained(args.path, **{name: getattr(args, name) for name in DESCRIBED})
    options = prepare(options_of(trained, args), trained.role, trains=False)
    network = trained.network(options)
    splits = splits_of(options, trained.role)
    if trained.num_classes != splits.num_classes:
        known = f"{trained.path} tells {trained.num_classes} classes apart"
        raise UsageError(f"{known}; {splits.name} has {splits.num_classes}.")
    if trained.in_channels != splits.in_channels:
        known = f"{trained.path} takes inputs of {trained.in_channels} channels"
        raise UsageError(f"{known}; {splits.name} has {splits.in_channels}.")
    device = torch.device(options.device)
    layout = memory_format(options)
    network.to(device, memory_format=layout)
    ranks.say(f"{trained.path}: {headline(trained, options)}")
    feed = Feed(val_loader_of(splits, options), device, splits.finish_val, layout)
    begun = time.perf_counter()
    result = evaluate(task_of(network, trained.role), feed, device=device, amp=options.amp)
    speed = len(splits.val) / (time.perf_counter() - begun)
    measured = {name: result[name] for name in ("accuracy", "accuracy_at", "firing_rate")}
    found = {"checkpoint": str(trained.path), "dataset": splits.name, "samples": len(splits.val), **measured}
    ranks.say(table(found))
    before = "" if trained.accuracy is None else f"in training: {trained.accuracy:.2%}; "
    ranks.say(f"{before}{speed:.0f} images/s")
    if args.json is not None and ranks.first():
        _write(json.dumps(found, indent=2) + "\n", Path(os.path.realpath(args.json)))
    return found


def _write(text: str, path: Path) -> None:
    """Write a file whole or not at all; into a pipe or a device it goes as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        disk.write(text.encode(), path)


def options_of(trained: Trained, args: argparse.Namespace) -> argparse.Namespace:
    """The run's options as they are to hold here.

    Raises:
        UsageError: They cannot.
    """
    saved = trained.options
    given = {name: value for name, value in vars(args).items() if value is not None}
    changes = {name: value for name, value in given.items() if name not in ("path", "json", *DESCRIBED)}
    if "backend" in changes and trained.role == "teacher":
        raise UsageError(f"--backend is for students; {trained.path} holds a teacher.")
    if "data_path" not in changes and saved["data_path"] is not None and not Path(saved["data_path"]).exists():
        raise UsageError(f"--data_path: the run found its data in {saved['data_path']}, which is not here.")
    # The device is this machine's, and what concerns training must not matter. No teacher is asked for.
    here = {"device": None, "cuda_graph": False, "accumulate": 1, "train_batch_size": smallest_part(), "method": "ce"}
    merged = {**saved, **{name: here[name] for name in here if name in saved}, **changes}
    if merged["amp"] not in AMP:
        raise UsageError(f"--amp must be one of {', '.join(AMP)}; the run in {trained.path} has {merged['amp']!r}.")
    return argparse.Namespace(**merged)


def task_of(network: torch.nn.Module, role: str) -> DistillTask | TeacherTask:
    """The task that predicts with a network; nothing is learned from it."""
    if role == "teacher":
        return TeacherTask(network)
    return DistillTask(network, None, method="ce", alpha=0.0, beta=0.0, temperature=1.0, backend="torch")


def headline(trained: Trained, options: argparse.Namespace) -> str:
    """What is evaluated, and how."""
    epoch = "" if trained.epoch is None else f", epoch {trained.epoch}"
    arch, where = arch_of(trained.options), f"device {options.device}, amp {options.amp}"
    if trained.role == "teacher":
        return f"a {arch}{epoch}; {where}"
    return f"a {arch} over {options.T} time steps{epoch}; {where}, neurons on {kernels_of(options)['lif']}"


def table(found: dict) -> str:
    """Accuracy after each of the first t steps, and how much each layer of neurons fires."""
    accuracies = found["accuracy_at"]
    steps = "".join(f"{f't = {t}':>9}" for t in range(1, len(accuracies) + 1)) if len(accuracies) > 1 else ""
    title = f"accuracy on {found['samples']:,} validation samples of {found['dataset']}"
    lines = [f"{title}{steps}", " " * len(title) + "".join(f"{accuracy:>9.2%}" for accuracy in accuracies)]
    rates = found["firing_rate"]
    if rates:
        mean = "mean of layers"
        width = max(map(len, [*rates, mean]))
        lines += ["", "spikes per neuron and time step"]
        lines += [f"  {name:<{width}}  {rate:6.1%}" for name, rate in rates.items()]
        lines.append(f"  {mean:<{width}}  {sum(rates.values()) / len(rates):6.1%}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Options of `train/evaluate.py`; what is not given is as it was in training."""
    found = Parser("seal-fast-evaluate", description="Evaluate what a run has trained.", allow_abbrev=False)
    found.add_argument("path", help="the run's folder, its best.pt, or the model_weights.pth of the published code")
    published = found.add_argument_group("checkpoints of the published code", "what these do not say of themselves")
    published.add_argument("--stu_arch", choices=STUDENTS, help="the student")
    published.add_argument("--arch", choices=TEACHERS, help="the teacher")
    published.add_argument("--dataset", help=", ".join(data.DATASETS))
    published.add_argument("--decay", type=float, help="membrane decay (default: per dataset)")
    published.add_argument("--thresh", type=float, help="firing threshold (default: 1)")
    published.add_argument("--v_reset", help="potential after a spike, or 'none' for soft reset (default: 0)")
    found.add_argument("--data_path", type=os.path.expanduser, help="folder of the dataset (default: as in training)")
    found.add_argument(
        "--T", type=int, help="time steps, of events so many frames, which are made and kept (default: as in training)"
    )
    found.add_argument("--val_batch_size", type=int, help="(default: as in training)")
    found.add_argument("--num_workers", type=int, help="processes that load data (default: as in training)")
    found.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    found.add_argument("--amp", choices=AMP, help="autocast (default: as in training)")
    found.add_argument("--backend", choices=("auto", *BACKENDS), help="kernels (default: as in training)")
    found.add_argument("--json", metavar="FILE", type=os.path.expanduser, help="write the figures to FILE, too")
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point of `seal-fast-evaluate`; returns the exit code."""
    return command(parser(), run, argv, left="the run's folder is as it was")


if __name__ == "__main__":
    sys.exit(main())
