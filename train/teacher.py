"""Train an ANN teacher: `seal-fast-teacher --dataset CIFAR10 --data_path D`.

Also runs as `python train/teacher.py`.
"""

from __future__ import annotations

import argparse
import sys

from seal_fast.train import ranks
from seal_fast.train.command import command
from seal_fast.train.folder import Run
from seal_fast.train.networks import network_of
from seal_fast.train.options import teacher_parser
from seal_fast.train.run import prepare, splits_of, train
from seal_fast.train.tasks import TeacherTask


def run(args: argparse.Namespace) -> dict:
    """Train the teacher that the options describe.

    Returns:
        Accuracy of the best epoch, and the run's folder.
    """
    args = prepare(args, "teacher")
    folder = ranks.from_first(Run, args, f"teacher-{args.dataset}-{args.arch}")
    splits = splits_of(args, "teacher")
    network = network_of(args, num_classes=splits.num_classes, in_channels=splits.in_channels)
    return train(args, TeacherTask(network), splits, folder, spiking=False)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `seal-fast-teacher`; returns the exit code."""
    return command(teacher_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
