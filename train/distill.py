"""Distil a spiking student: `seal-fast-distill --dataset CIFAR10 --data_path D --tea_path P`.

Also runs as `python train/distill.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from seal_fast.models import folded
from seal_fast.train import ranks
from seal_fast.train.checkpoint import load_teacher
from seal_fast.train.checks import as_published, kernels_of
from seal_fast.train.command import command
from seal_fast.train.folder import Run
from seal_fast.train.networks import network_of, stem_of
from seal_fast.train.options import distill_parser
from seal_fast.train.run import prepare, splits_of, train
from seal_fast.train.step import AMP_DTYPES
from seal_fast.train.tasks import DistillTask


def run(args: argparse.Namespace) -> dict:
    """Train the student that the options describe.

    Returns:
        Of the best epoch: accuracy, accuracy at t = 1…T and firing rates; and the run's folder.
    """
    args = prepare(args, "student")
    folder = ranks.from_first(Run, args, f"distill-{args.dataset}-{args.stu_arch}-{args.method}")
    splits = splits_of(args, "student")
    # Before the teacher, whose own initialisation would otherwise change the student that a seed stands for.
    sizes = {"num_classes": splits.num_classes, "in_channels": splits.in_channels}
    network = network_of(args, **sizes)
    teacher = None
    if args.method != "ce":
        teacher = load_teacher(
            Path(args.tea_path),
            args.tea_arch,
            **sizes,
            stem=stem_of(args.dataset, args.tea_arch),
        ).to(args.device)
        if not as_published(args):
            # In the precision of the student, cast once and not at each step.
            teacher = folded(teacher).to(dtype=AMP_DTYPES[args.amp], memory_format=torch.channels_last)
    task = DistillTask(
        network,
        teacher,
        method=args.method,
        alpha=args.alpha,
        beta=args.beta,
        temperature=args.temperature,
        backend=kernels_of(args)["seal_loss"],
    )
    return train(args, task, splits, folder, spiking=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `seal-fast-distill`; returns the exit code."""
    return command(distill_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
