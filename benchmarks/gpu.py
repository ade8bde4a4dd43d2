"""Everything that needs a GPU, in one command that needs no network: make gpu.

Installs the project into the running Python if it is not there, then runs the tests with the GPU's kernels,
compute-sanitizer where it is installed, and the benchmarks, and writes benchmarks/results/<gpu>-<date>-<commit>.json
with the machine, the versions, the commit, what passed and every figure. Ends with an error if anything failed.

Folders named in SPIKINGJELLY, separated as in PATH, each with another version of SpikingJelly in it, are further peers.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"tests": 240, "memcheck": 60, "racecheck": 60, "benchmarks": 200}  # seconds; under ten minutes together
SANITIZED = ROOT / "benchmarks" / "sanitized.py"


def run(name: str, command: list[str], limit: float, **environment: str) -> dict:
    """Run a step and show its output: how it ended, and how long it took."""
    print(f"\n==> {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=limit, env={**os.environ, **environment}).returncode
    except subprocess.TimeoutExpired:
        code = -1
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


def benchmark(folder: Path) -> tuple[list[dict], list[dict], dict]:
    """All benchmarks, once for each version of SpikingJelly: steps, figures, and the machine."""
    others = [path for path in os.environ.get("SPIKINGJELLY", "").split(os.pathsep) if path]
    steps, figures, machine = [], [], {}
    for number, peer in enumerate(["", *others]):
        path = folder / f"{number}.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "--seconds=0.1", f"--benchmark-json={path}"]
        # The kernels are compared with each other version alone; torch's loops were timed in the first run.
        command += ["-k", "seal-fast or SpikingJelly"] if peer else []
        command += ["--benchmark-columns=min,median,rounds", "-p", "no:cacheprovider"]
        python_path = os.pathsep.join(filter(None, [peer, os.environ.get("PYTHONPATH", "")]))
        limit = LIMITS["benchmarks"] / (1 + len(others))
        steps.append(run(f"benchmarks {peer}".strip(), command, limit, PYTHONPATH=python_path))
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


def main() -> int:
    """Run all steps; return the exit status."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU that torch finds; without one, make test checks the kernels.")
        return 2
    install()
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    tests = [*pytest, "tests/kernels", "tests/seal_fast", "-k", "triton or cupy or gpu"]
    # What needs no GPU is for make test: Triton's interpreter, and compiling for other GPUs.
    tests += ["--ignore-glob=*_triton.py", "--ignore-glob=*_compile.py"]
    steps = [run("tests", tests, LIMITS["tests"])]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).exists():
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=1", sys.executable, str(SANITIZED)]
            steps.append(run(tool, command, LIMITS[tool]))
    else:
        print("\ncompute-sanitizer is not installed; memory and races were not checked")
    with tempfile.TemporaryDirectory() as folder:
        timed, figures, machine = benchmark(Path(folder))
    steps += timed

    today, gpu = datetime.date.today().isoformat(), torch.cuda.get_device_name(0)
    results = {"gpu": gpu, "date": today, "commit": commit(), "machine": machine, "steps": steps, "figures": figures}
    target = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{gpu.replace(' ', '-')}-{today}-{results['commit']}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n==> {path}")
    for step in steps:
        print(f"{'passed' if step['passed'] else 'FAILED'}  {step['step']}  {step['seconds']} s")
    return 0 if all(step["passed"] for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
