"""The whole path on scikit-learn's digits: train a teacher, distil spiking students, compare them at each time step."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from seal_fast.train import distill, teacher
from seal_fast.train.checks import resolve
from seal_fast.train.command import command
from seal_fast.train.errors import StoppedError
from seal_fast.train.options import Parser, distill_parser, teacher_parser
from seal_fast.train.run import require

LEFT = "what its runs have saved is whole, and the demo starts anew"
STUDENTS = {"labels only": "ce", "uniform kd": "kd", "seal": "seal"}


def run(args: argparse.Namespace) -> None:
    """Train one teacher and three students, and print the table.

    Raises:
        StoppedError: A signal was received; the training at hand is saved.
    """
    try:
        _run(args)
    except StoppedError as error:
        raise StoppedError(error.code, f"{error} The demo itself starts anew.") from None


def _run(args: argparse.Namespace) -> None:
    shared = ["--dataset", "DIGITS", "--log_path", args.log_path, "--seed", str(args.seed)]
    if args.num_epoch is not None:
        shared += ["--num_epoch", str(args.num_epoch)]
    # Mistakes are found before the teacher is trained.
    require(teacher_parser().parse_args(shared), trains=True)
    resolve(distill_parser().parse_args([*shared, "--T", str(args.T), "--method", "ce"]), role="student")
    print("Training the teacher, an ordinary ResNet-8, on 1,437 handwritten digits.", flush=True)
    taught = teacher.run(teacher_parser().parse_args(shared))
    rows = [("teacher", [taught["accuracy"]] * args.T, None)]
    for name, method in STUDENTS.items():
        print(f"\nTraining a spiking ResNet-8 over {args.T} time steps: {name}.", flush=True)
        options = [*shared, "--T", str(args.T), "--method", method, "--tea_path", str(taught["folder"])]
        result = distill.run(distill_parser().parse_args(options))
        rates = result["firing_rate"].values()
        rows.append((f"SNN, {name}", result["accuracy_at"], sum(rates) / len(rates)))
    print("\n" + table(rows, args.T))
    print(f"\nPlots: {result['folder']}/*.png, and likewise in the other folders under {Path(args.log_path)}/")


def table(rows: list[tuple[str, list[float], float | None]], time_steps: int) -> str:
    """Accuracy on the held-out digits from the first t steps, and mean spikes per neuron and time step."""
    steps = "".join(f"{f't = {t}':>9}" for t in range(1, time_steps + 1))
    lines = [f"{'accuracy on 360 held-out digits':<32}{steps}{'firing rate':>14}"]
    for name, accuracies, rate in rows:
        cells = "".join(f"{accuracy:>9.2%}" for accuracy in accuracies)
        lines.append(f"{name:<32}{cells}{'-' if rate is None else f'{rate:.1%}':>14}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `seal-fast-demo`; returns the exit code."""
    parser = Parser("seal-fast-demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--log_path", default="runs/demo", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=60, help="(default: %(default)s)")
    parser.add_argument("--T", type=int, default=4, help="time steps (default: %(default)s)")
    parser.add_argument("--num_epoch", type=int, help="epochs of each run (default: that of the trainers)")
    return command(parser, run, argv, left=LEFT)


if __name__ == "__main__":
    sys.exit(main())
