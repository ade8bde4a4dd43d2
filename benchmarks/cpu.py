"""What a processor makes of it, in one command: make bench.

Runs the tests of what is timed, and, if they pass, the benchmarks in less than ten minutes on two cores; writes
benchmarks/results/<processor>.csv with every figure, the machine, the versions and the commit, and its plots.

    python benchmarks/cpu.py --tiny      smallest sizes: a check that all of it runs; --results FOLDER keeps it apart
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import tables
from steps import finish, run

GATE = (
    *(f"tests/seal_fast/test_golden_{name}.py" for name in ("lif", "loss", "models")),
    *(f"tests/kernels/test_{name}_cpu.py" for name in ("lif", "bn_lif", "seal_loss", "spike_conv")),
)
# file -> in how many processes it runs, and pytest's expression for what is timed. Processes differ, and minutes do
# where other programs share the machine. torch.compile needs minutes for a training step. Networks come first, when a
# process has not cut its memory into small pieces yet, as in a trainer's.
BENCHMARKS = {
    "bench_inference": (2, "resnet18-cifar"),
    "bench_train": (2, "resnet18-cifar and not compile and not dense"),
    "bench_parts": (1, ""),
    "bench_lif": (
        3,
        "resnet18.layer1 and not channels_last and (layer1-4 or both) and not compile or "
        "resnet18.layer1-4-f32-contiguous-both",
    ),
    "bench_seal_loss": (3, "both and (cifar100 or imagenet or dvs)"),
    "bench_scaling": (3, ""),
    "bench_host": (1, ""),
    "bench_spike_conv": (1, "layer1"),
}
RUNS = max(runs for runs, _ in BENCHMARKS.values())
LIMIT = 590  # seconds for one step, a bound against hanging


def main(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, and no tests before")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each contestant (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=tables.FOLDER, help="folder of the results")
    args = parser.parse_args(arguments)
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    if args.tiny:
        pytest.append("--tiny")
    done, contents = [], []
    if not args.tiny:
        done.append(run("tests", [*pytest, *GATE], LIMIT))
        if not done[0]["passed"]:
            print("\nnothing is timed, because a test failed")
            return finish(done, contents, args.results)
    with tempfile.TemporaryDirectory() as folder:
        path, pool = Path(folder) / "benchmarks.json", Path(folder) / "pool.json"
        options = [f"--seconds={args.seconds / RUNS}", f"--pool={pool}"]
        shown = [f"--benchmark-json={path}", "--benchmark-columns=min,median,rounds", "--benchmark-quiet"]
        for left in reversed(range(RUNS)):
            chosen = {name: cases for name, (runs, cases) in BENCHMARKS.items() if runs > left}
            files = [f"benchmarks/{name}.py" for name in chosen]
            expression = " or ".join(f"{name} and ({cases})" if cases else name for name, cases in chosen.items())
            command = [*pytest, *files, "-k", expression, *options, *(["--benchmark-disable"] if left else shown)]
            done.append(run(f"benchmarks, run {RUNS - left} of {RUNS}", command, LIMIT))
        if path.exists():
            contents.append(json.loads(path.read_text(encoding="utf-8")))
    return finish(done, contents, args.results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
