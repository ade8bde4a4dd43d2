"""Evaluate what a run has trained: `seal-fast-evaluate RUN --data_path D`.

Also runs as `python train/evaluate.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from seal_fast.backends import BACKENDS
from seal_fast.train import checkpoint, ranks
from seal_fast.train.command import command
from seal_fast.train.engine import evaluate
from seal_fast.train.errors import UsageError
from seal_fast.train.feed import Feed
from seal_fast.train.networks import arch_of, read, restored, role_of, sizes_of
from seal_fast.train.options import AMP, Parser, as_published, distill_parser, kernels_of, teacher_parser
from seal_fast.train.run import loaders_of, prepare, splits_of
from seal_fast.train.tasks import DistillTask, TeacherTask

# Options of training that evaluation neither has nor needs; no teacher is asked for.
WITHOUT = {"resume": None, "run_name": None, "cuda_graph": False, "accumulate": 1, "method": "ce"}


def run(args: argparse.Namespace) -> dict:
    """Evaluate the network that the options name on the validation part of its dataset.

    Returns:
        checkpoint, dataset, samples, T; accuracy, accuracy_at t = 1…T, and firing_rate by layer.
    """
    content, path = read(args.path)
    changes = {name: value for name, value in vars(args).items() if name not in ("path", "json") and value is not None}
    options = options_of(content["options"], changes)
    role = role_of(vars(options))
    options = prepare(options, role)
    network = restored(content, path, options)
    splits = splits_of(options, role)
    classes = sizes_of(content["best_net"])["num_classes"]
    if classes != splits.num_classes:
        raise UsageError(f"{path} tells {classes} classes apart; {splits.name} has {splits.num_classes}.")
    device = torch.device(options.device)
    network.to(device, memory_format=torch.contiguous_format if as_published(options) else torch.channels_last)
    unused = {"alpha": 0.0, "beta": 0.0, "temperature": 1.0, "backend": "torch"}
    task = DistillTask(network, None, method="ce", **unused) if role == "student" else TeacherTask(network)
    kernels = f", neurons on {kernels_of(options)['lif']}" if role == "student" else ""
    ranks.say(
        f"{path}: a {arch_of(vars(options))}{f' over {options.T} time steps' if role == 'student' else ''}, "
        f"epoch {content['epoch']}; device {device}, amp {options.amp}{kernels}"
    )
    feed = Feed(loaders_of(splits, options)[1], device, splits.finish_val)
    begun = time.perf_counter()
    result = evaluate(task, feed, device=device, amp=options.amp)
    seconds = time.perf_counter() - begun
    found = {"checkpoint": str(path), "dataset": splits.name, "samples": len(splits.val), "T": task.time_steps}
    found |= {name: result[name] for name in ("accuracy", "accuracy_at", "firing_rate")}
    ranks.say(table(found))
    ranks.say(f"in training: {content['accuracy']:.2%}; {len(splits.val) / seconds:.0f} images/s")
    if args.json is not None and ranks.first():
        checkpoint.write((json.dumps(found, indent=2) + "\n").encode(), Path(args.json))
    return found


def options_of(saved: dict, changes: dict) -> argparse.Namespace:
    """Options of a run as they are to hold here."""
    parser = distill_parser() if role_of(saved) == "student" else teacher_parser()
    # What is newer than the checkpoint has its default, and the device is this machine's.
    known = vars(parser.parse_args(["--dataset", saved["dataset"]]))
    merged = {**known, **saved, "device": None, **changes}
    return argparse.Namespace(**{**merged, **{name: value for name, value in WITHOUT.items() if name in known}})


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
    found.add_argument("path", help="the run's folder, or its best.pt")
    found.add_argument("--data_path", help="folder of the dataset (default: as in training)")
    found.add_argument("--T", type=int, help="time steps (default: as in training)")
    found.add_argument("--val_batch_size", type=int, help="(default: as in training)")
    found.add_argument("--num_workers", type=int, help="processes that load data (default: as in training)")
    found.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    found.add_argument("--amp", choices=AMP, help="autocast (default: as in training)")
    found.add_argument("--backend", choices=("auto", *BACKENDS), help="kernels (default: as in training)")
    found.add_argument("--json", metavar="FILE", help="write the figures to FILE, too")
    return found


def main(argv: list[str] | None = None) -> int:
    """Entry point of `seal-fast-evaluate`; returns the exit code."""
    return command(parser(), run, argv, left="nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
