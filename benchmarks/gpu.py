"""Everything that needs a GPU, in one command that needs no network: make gpu.

Installs the project into the running Python if it is not there, then runs the tests with the GPU's kernels,
compute-sanitizer where it is installed, and the benchmarks, and writes benchmarks/results/<gpu>-<date>-<commit>.json
with the machine, the versions, the commit, what passed and every figure. Ends with an error if anything failed.

    python benchmarks/gpu.py training      one step alone, with all the time: here also what torch.compile needs for it

Folders named in SPIKINGJELLY, separated as in PATH, each with another version of SpikingJelly in it, are further peers.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Seconds; under ten minutes together, which is what one step may take that runs alone.
LIMITS = {"tests": 200, "memcheck": 50, "racecheck": 50, "benchmarks": 170, "training": 120}
ALONE = 590
STEPS = ("tests", "sanitizer", "benchmarks", "training")
SANITIZED = ROOT / "benchmarks" / "sanitized.py"


def run(name: str, command: list[str], limit: float, **environment: str) -> dict:
    """Run a step and show its output: how it ended, and how long it took."""
    print(f"\n==> {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = -1
        process.send_signal(signal.SIGINT)  # pytest then writes the figures that it has
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        print(f"{name} took longer than {limit:.0f} s and was stopped", flush=True)
    return {"step": name, "passed": code == 0, "seconds": round(time.monotonic() - start, 1)}


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
) -> tuple[list[dict], list[dict], dict]:
    """Benchmarks, once for each version of SpikingJelly.

    Args:
        folder: For figures.
        name: Of the step.
        files: What pytest runs.
        chosen: pytest's expression for what runs with the version that is installed; empty for everything.
        of_peers: The same for all other versions.
        limit: Seconds for all versions together.

    Returns:
        Steps, figures, and the machine.
    """
    others = [path for path in os.environ.get("SPIKINGJELLY", "").split(os.pathsep) if path]
    steps, figures, machine = [], [], {}
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
            machine = machine or content["machine_info"]
            figures += [
                {"group": entry["group"], "milliseconds": entry["stats"]["min"] * 1e3, **entry["extra_info"]}
                for entry in content["benchmarks"]
            ]
    return steps, figures, machine


def commit() -> str:
    """The commit of the sources, marked where they differ from it."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return "unknown"
    head = subprocess.run([git, "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    changed = subprocess.run([git, "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True).stdout
    return (head.strip() or "unknown") + ("-changed" if changed.strip() else "")


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


def measure(steps: list[str], limits: dict[str, float]) -> tuple[list[dict], list[dict], dict]:
    """Run the benchmarks that `steps` names: what ran, figures, and the machine."""
    done, figures, machine = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        training = "benchmarks/bench_train.py"
        # The kernels are compared with each other version alone; torch's loops were timed in the first run.
        kernels = ["benchmarks", f"--ignore={training}"], "", "seal-fast or SpikingJelly"
        # torch.compile needs minutes for a training step.
        whole = [training], "" if steps == ["training"] else "not compile", "control"
        for name, options in {"benchmarks": kernels, "training": whole}.items():
            if name in steps:
                ran, timed, found = benchmark(Path(folder), name, *options, limits[name])
                done, figures, machine = done + ran, figures + timed, machine or found
    return done, figures, machine


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
    steps = check(chosen, limits)
    timed, figures, machine = measure(chosen, limits)
    steps += timed

    today, gpu = datetime.date.today().isoformat(), torch.cuda.get_device_name(0)
    results = {"gpu": gpu, "date": today, "commit": commit(), "machine": machine, "steps": steps, "figures": figures}
    target = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    target.mkdir(parents=True, exist_ok=True)
    names = [gpu.replace(" ", "-"), today, results["commit"], *arguments]
    path = target / f"{'-'.join(names)}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n==> {path}")
    for step in steps:
        print(f"{'passed' if step['passed'] else 'FAILED'}  {step['step']}  {step['seconds']} s")
    return 0 if all(step["passed"] for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
