"""Everything that needs a GPU, in one command that needs no network: make gpu.

Installs the project into the running Python if it is not there, then runs the tests with the GPU's kernels,
compute-sanitizer where it is installed, and, if they pass, the benchmarks. Writes benchmarks/results/<gpu>.csv with
every figure, the machine, the versions, the commit and what passed, and its plots. Fails if anything failed.

    python benchmarks/gpu.py training      one step alone, with all the time: here also what torch.compile needs for it

Folders named in SPIKINGJELLY, separated as in PATH, each with another version of SpikingJelly in it, are further peers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tables
from steps import ROOT, finish, run

# Seconds; under ten minutes together, which is what one step may take that runs alone.
LIMITS = {"tests": 200, "memcheck": 50, "racecheck": 50, "benchmarks": 170, "training": 120}
ALONE = 590
STEPS = ("tests", "sanitizer", "benchmarks", "training")
SANITIZED = ROOT / "benchmarks" / "sanitized.py"


def install() -> None:
    """Make `import seal_fast` work: an editable install that fetches nothing."""
    if importlib.util.find_spec("seal_fast") is None or importlib.util.find_spec("seal_fast.kernels") is None:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "-e",
            ".",
        ]
        subprocess.run(pip, cwd=ROOT, check=True)


def benchmark(
    folder: Path, name: str, files: list[str], chosen: str, of_peers: str, limit: float
) -> tuple[list[dict], list[dict]]:
    """Benchmarks, once for each version of SpikingJelly; groups of the others are named after it.

    Args:
        folder: For figures.
        name: Of the step.
        files: What pytest runs.
        chosen: pytest's expression for what runs with the version that is installed; empty for everything.
        of_peers: The same for all other versions.
        limit: Seconds for all versions together.

    Returns:
        Steps, and what pytest-benchmark wrote.
    """
    others = [path for path in os.environ.get("SPIKINGJELLY", "").split(os.pathsep) if path]
    steps, contents = [], []
    for number, peer in enumerate(["", *others]):
        path = folder / f"{name}-{number}.json"
        command = [sys.executable, "-m", "pytest", *files, "--seconds=0.1", f"--benchmark-json={path}"]
        command += [
            "-k",
            of_peers if peer else chosen,
            "--benchmark-columns=min,median,rounds",
            "-p",
            "no:cacheprovider",
        ]
        python_path = os.pathsep.join(filter(None, [peer, os.environ.get("PYTHONPATH", "")]))
        steps.append(run(f"{name} {peer}".strip(), command, limit / (1 + len(others)), PYTHONPATH=python_path))
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            for entry in content["benchmarks"] if peer else ():
                entry["group"] += f" (SpikingJelly {content['machine_info']['versions']['spikingjelly']})"
            contents.append(content)
    return steps, contents


def check(steps: list[str], limits: dict[str, float]) -> list[dict]:
    """Run the tests and compute-sanitizer, as far as `steps` names them."""
    done = []
    if "tests" in steps:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels", "tests/seal_fast"]
        # What needs no GPU is for make test: Triton's interpreter, and compiling for other GPUs.
        command += ["-k", "triton or cupy or gpu", "--ignore-glob=*_triton.py", "--ignore-glob=*_compile.py"]
        done.append(run("tests", command, limits["tests"]))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if "sanitizer" in steps and Path(sanitizer).exists():
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=1", sys.executable, str(SANITIZED)]
            done.append(run(tool, command, limits[tool]))
    elif "sanitizer" in steps:
        print("\ncompute-sanitizer is not installed; memory and races were not checked")
    return done


def measure(steps: list[str], limits: dict[str, float]) -> tuple[list[dict], list[dict]]:
    """Run the benchmarks that `steps` names: what ran, and what pytest-benchmark wrote."""
    done, contents = [], []
    with tempfile.TemporaryDirectory() as folder:
        training = "benchmarks/bench_train.py"
        # The kernels are compared with each other version alone; torch's loops were timed in the first run.
        kernels = ["benchmarks", f"--ignore={training}"], "", "seal-fast or SpikingJelly"
        # torch.compile needs minutes for a training step.
        whole = [training], "" if steps == ["training"] else "not compile", "control"
        for name, options in {"benchmarks": kernels, "training": whole}.items():
            if name in steps:
                ran, timed = benchmark(Path(folder), name, *options, limits[name])
                done, contents = done + ran, contents + timed
    return done, contents


def main(arguments: list[str]) -> int:
    """Run the named steps, or all of them; return the exit status."""
    import torch

    unknown = [name for name in arguments if name not in STEPS]
    if unknown:
        print(f"steps are {', '.join(STEPS)}; got {unknown[0]!r}.")
        return 2
    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU that torch finds; without one, make test checks the kernels.")
        return 2
    install()
    chosen = arguments or list(STEPS)
    limits = LIMITS if len(chosen) > 1 else {name: ALONE / 2 if "check" in name else ALONE for name in LIMITS}
    done = check(chosen, limits)
    contents = []
    if all(step["passed"] for step in done):
        timed, contents = measure(chosen, limits)
        done += timed
    elif set(chosen) & {"benchmarks", "training"}:
        print("\nnothing is timed, because a check failed")
    return finish(done, contents, Path(os.environ.get("OUT", tables.FOLDER)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
