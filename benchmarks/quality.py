"""Accuracy of the trainers' default arithmetic against the published one, for each objective, on handwritten digits.

    python benchmarks/quality.py --dataset DIGITS                      five seeds; goes on where it was interrupted
    python benchmarks/quality.py --dataset DIGITS_DVS --data_path D    events from filming them; made in D if missing

"default" is what the trainers do when nothing is asked for: bfloat16 where it is faster, fused kernels, channels_last.
"published" is float32 in torch, in its default layout. DIGITS_DVS has frames of 16 x 16 pixels and no augmentation, so
that ten epochs teach it. Results go to results/quality-DATASET.csv, and to the screen.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path

import measure
from seal_fast.train import distill, teacher
from seal_fast.train.options import METHODS, distill_parser, teacher_parser

ARITHMETIC = {"default": [], "published": ["--amp", "off", "--backend", "torch"]}
SETTINGS = {"DIGITS": [], "DIGITS_DVS": ["--frame_size", "16", "--auto_aug", "false", "--num_workers", "0"]}
OBJECTIVES = ("ce", "kd", "tdkd", "ela", "sta", "seal")
FIELDS = ("dataset", "epochs", "objective", "arithmetic", "seed", "accuracy", "machine", "torch", "commit")
assert set(OBJECTIVES) == set(METHODS)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=SETTINGS, default="DIGITS")
    parser.add_argument("--data_path", help="folder of DIGITS_DVS")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--num_epoch", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    path = args.results / f"quality-{args.dataset}.csv"
    with tempfile.TemporaryDirectory() as runs:
        for seed in range(args.seeds):
            train_seed(args, path, seed, runs)
    print(table(read(path)))


def train_seed(args: argparse.Namespace, path: Path, seed: int, runs: str) -> None:
    """Train one teacher, and of it each student whose row is not in the file yet."""
    done = {(row["objective"], row["arithmetic"], int(row["seed"])) for row in read(path)}
    missing = [(o, a) for o in OBJECTIVES for a in ARITHMETIC if (o, a, seed) not in done]
    if not missing:
        return
    shared = ["--dataset", args.dataset, "--seed", str(seed), "--num_epoch", str(args.num_epoch), "--log_path", runs]
    shared += SETTINGS[args.dataset]
    shared += ["--data_path", args.data_path] if args.data_path else []
    taught = teacher.run(teacher_parser().parse_args([*shared, *ARITHMETIC["published"][:2]]))
    for objective, arithmetic in missing:
        options = [*shared, "--method", objective, "--tea_path", str(taught["folder"]), *ARITHMETIC[arithmetic]]
        name = f"{seed}-{objective}-{arithmetic}"
        result = distill.run(distill_parser().parse_args([*options, "--run_name", name]))
        machine, environment = measure.machine(), _environment(result["folder"])
        row = (args.dataset, args.num_epoch, objective, arithmetic, seed, f"{result['accuracy']:.6f}")
        _append(path, dict(zip(FIELDS, (*row, machine.get("gpu") or machine["cpu"], *environment), strict=True)))


def _environment(folder: Path) -> tuple[str, str]:
    environment = json.loads((folder / "config.json").read_text(encoding="utf-8"))["environment"]
    return environment["torch"], environment["commit"]


def _append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[dict]:
    """Rows of a results file, none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict]) -> str:
    """Accuracy in per cent, mean ± standard deviation over the seeds."""
    lines = [f"{'objective':<12}" + "".join(f"{arithmetic:>22}" for arithmetic in ARITHMETIC)]
    for objective in OBJECTIVES:
        cells = ""
        for arithmetic in ARITHMETIC:
            chosen = [row for row in rows if (row["objective"], row["arithmetic"]) == (objective, arithmetic)]
            values = [100 * float(row["accuracy"]) for row in chosen]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            cells += f"{statistics.mean(values):>10.2f} ± {spread:4.2f} (n={len(values)})" if values else f"{'-':>22}"
        lines.append(f"{objective:<12}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
