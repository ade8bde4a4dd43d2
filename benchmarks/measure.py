"""What benchmarks share: the machine, timing on any device, and the copy bandwidth as the measure of the floor."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch.autograd.graph import saved_tensors_hooks

import seal_fast
from seal_fast.ops._spike_tensor import SpikeTensor

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


def copying(bytes_read: int) -> Callable[[], torch.Tensor]:
    """A copy of so many bytes into memory that exists: what reading and writing them takes at the least, about."""
    source = torch.empty(bytes_read // 4, dtype=torch.float32, device=device()).uniform_()
    target = source.clone()
    return lambda: target.copy_(source)


readings: Iterator[float] = iter(())


def replay() -> float:
    """A clock for pytest-benchmark that shows `readings`: what was timed before, in turn with other contestants."""
    return next(readings)


class Failure(NamedTuple):
    """Why a contestant has no figures. It is text alone: an exception would keep the tensors of its frames.

    Attributes:
        reason: Type and text of what it raised.
        trace: Where it was raised.
        out_of_memory: Whether the GPU has too little memory for it.
    """

    reason: str
    trace: str
    out_of_memory: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure that an exception stands for."""
        text = "".join(traceback.format_exception(error))
        return cls(f"{type(error).__name__}: {error}", text, isinstance(error, torch.cuda.OutOfMemoryError))

    def line(self, width: int = 120) -> str:
        """The reason in one line of at most `width` characters."""
        text = " ".join(self.reason.split())
        return text if len(text) <= width else f"{text[: width - 3]}..."


@contextlib.contextmanager
def noting(failed: dict[str, Failure] | None, name: str):
    """Put what the block raises into `failed` under the contestant's name, and go on; None lets it pass."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        failed[name] = Failure.of(error)


def race(
    steps: dict[str, Callable[[], object]],
    seconds: float,
    least: int = 3,
    turn: float = 0.0,
    failed: dict[str, Failure] | None = None,
) -> dict[str, list[float]]:
    """Seconds of a call of each step, in turns, so that a drift of the machine's speed hits all alike.

    Args:
        steps: Name -> a function that has been called before.
        seconds: How long to go on, for each step; 500 rounds at most.
        least: How many rounds there are at the least.
        turn: How long a step's turn takes at the least, in seconds; 0 for one call. The step before leaves other data
            in the caches, and sleeping threads, which one call of a short step would pay for.
        failed: Gets the failure of each step that raises, which leaves the race and has no times; without it the error
            is raised.
    """
    calls: dict[str, int] = {}
    for name, step in steps.items():
        with noting(failed, name):
            calls[name] = math.ceil(turn / _seconds(synchronised(step))) if turn else 1
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(steps)
    for done in range(500):
        if done >= least and time.perf_counter() > end:
            break
        for name in [*times]:
            run = synchronised(lambda name=name: [steps[name]() for _ in range(calls[name])])
            with noting(failed, name):
                times[name].append(_seconds(run) / calls[name])
            if failed and name in failed:
                del times[name]
    return times


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def kept_bytes(forward: Callable[[], torch.Tensor], apart: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, each storage once.

    Where other hooks put something in a tensor's place inside `forward`, the tensors in that count instead.

    Args:
        forward: Computes what is differentiated.
        apart: Tensors that do not count, such as parameters.
    """
    kept = []

    def counted(pack):
        def run(tensor):
            packed = pack(tensor)
            kept.append(packed)
            return packed

        return run

    def enter(hooks):
        hooks.pack_hook = counted(hooks.pack_hook)
        return plain_enter(hooks)

    # Of nested hooks only the innermost run: those that `forward` brings along are counted where they begin.
    plain_enter = saved_tensors_hooks.__enter__
    with mock.patch.object(saved_tensors_hooks, "__enter__", enter), saved_tensors_hooks(_same, _same):
        result = forward()
    ignored = {tensor.untyped_storage().data_ptr() for tensor in apart}
    storages = {storage.data_ptr(): storage.nbytes() for storage in _storages(kept)}
    del result
    return sum(size for address, size in storages.items() if address not in ignored)


def _same(tensor):
    return tensor


def _storages(content) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in nested containers and objects."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, SpikeTensor):
            waiting.append(item.held)  # it has no storage of its own
        elif isinstance(item, torch.Tensor):
            yield item.untyped_storage()
        elif id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, dict):
                waiting += item.values()
            elif isinstance(item, (list, tuple)):
                waiting += item
            else:
                slots = [getattr(item, name, None) for name in getattr(type(item), "__slots__", ())]
                waiting += [*getattr(item, "__dict__", {}).values(), *slots]


def resident_bytes(peak: bool = False) -> int | None:
    """Memory of this process that is resident now, or was at the peak; None where the system does not tell."""
    name = "VmHWM:" if peak else "VmRSS:"
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
    except (OSError, StopIteration):
        return None
