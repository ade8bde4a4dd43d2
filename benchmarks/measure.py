"""What benchmarks share: the machine, timing on any device, and the copy bandwidth as the measure of the floor."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import time

import torch

import seal_fast

PACKAGES = ("torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "spikingjelly", "numpy")


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict:
    """What the figures depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts = {"versions": {"seal-fast": seal_fast.__version__, "python": platform.python_version(), **versions}}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        facts["cuda"] = torch.version.cuda
    facts["cpu"] = f"{_processor()}, {torch.get_num_threads()} threads"
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronised(step):
    """`step` as a callable that returns when the device is done with it."""
    if device().type == "cpu":
        return step

    def run():
        step()
        torch.cuda.synchronize()

    return run


def rounds(step, seconds: float, least: int) -> int:
    """How many calls of `step` fit into `seconds`, `least` or more."""
    step()
    start = time.perf_counter()
    step()
    return int(min(500, max(least, seconds / max(time.perf_counter() - start, 1e-6))))


@functools.cache
def copy_bandwidth(bytes_read: int) -> float:
    """Bytes a second, read and written, of torch's copy of so many bytes into memory that exists: the best of many."""
    source = torch.empty(bytes_read // 4, dtype=torch.float32, device=device()).uniform_()
    target = torch.empty_like(source)
    step = synchronised(lambda: target.copy_(source))
    best = float("inf")
    for _ in range(max(20, rounds(step, 0.5, 20))):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return 2 * bytes_read / best
