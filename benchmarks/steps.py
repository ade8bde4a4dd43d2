"""Steps of `make bench`: commands with a limit, and what is written at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import tables

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, command: list[str], limit: float) -> dict:
    """Run a step and show its output: how it ended, and how long it took."""
    print(f"\n==> {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    # A worker of pytest-xdist may have started this; pytest-benchmark would take itself for one, and measure nothing.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    process = subprocess.Popen(command, cwd=ROOT, env=inherited)
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


def finish(steps: list[dict], contents: list[dict], folder: Path = tables.FOLDER) -> int:
    """Write what pytest-benchmark found to `folder`, say which steps passed, and return the exit status."""
    if any(content["benchmarks"] for content in contents):
        tables.save(contents, steps, folder)
    for step in steps:
        print(f"{'passed' if step['passed'] else 'FAILED'}  {step['step']}  {step['seconds']} s")
    return 0 if all(step["passed"] for step in steps) else 1
