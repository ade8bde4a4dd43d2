"""How many threads want this machine's processors, and what to say where they are too many.

Threads of OpenMP wait for each other many times in a step, and spin while they wait: where other programs hold a
processor, a step takes many times as long as on fewer threads.
"""

from __future__ import annotations

import collections
import math
import os
import statistics
import threading
from pathlib import Path

import torch

from seal_fast.train import ranks

EVERY = 0.25  # seconds between two counts
COUNTS = 24  # of which the mean is taken: six seconds
MARGIN = 0.5  # threads beyond the processors that are no matter: the trainer's own short ones
_PROC = Path("/proc/stat")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": µs of each 100,000; or "max 100000"


def processors() -> int:
    """Processors that this process may use: by its affinity, and by its container's quota where there is one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        usable = min(usable, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return usable


def too_many_threads() -> str:
    """A sentence where this run's own threads are more than its processors; empty where they are not."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks.launched() else 1
    threads, usable = torch.get_num_threads(), processors()
    if threads * local <= usable or threads == 1:
        return ""
    each = f" in each of {local} processes" if local > 1 else ""
    return (
        f"torch computes on {threads} threads{each}, where this run may use {_processors(usable)}: set "
        f"OMP_NUM_THREADS={max(1, usable // local)}."
    )


def _processors(number: int) -> str:
    return f"{number} processor{'s' if number > 1 else ''}"


def runnable() -> int | None:
    """Threads that run or wait for a processor on this machine, the caller aside; None where the system cannot tell."""
    try:
        text = _PROC.read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) - 1 for line in text.splitlines() if line.startswith("procs_running")), None)


class Watch:
    """Counts threads within its context, until there were too many.

    Args:
        every: Seconds between two counts.
        count: What counts them.
    """

    def __init__(self, every: float = EVERY, count=runnable):
        self._every, self._count = every, count
        self._counts: collections.deque[int] = collections.deque(maxlen=COUNTS)
        self._mean: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        # On one thread there is nothing that waits for another.
        if torch.get_num_threads() > 1 and ranks.first() and self._count() is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._every):
            count = self._count()
            if count is None:
                return
            self._counts.append(count)
            if len(self._counts) < COUNTS:
                continue
            mean = statistics.fmean(self._counts)
            if mean > (os.cpu_count() or 1) + MARGIN:
                self._mean = mean
                return

    def sentence(self) -> str:
        """What there is to say, once; empty where there is nothing."""
        mean, self._mean = self._mean, None
        if mean is None:
            return ""
        there, threads = os.cpu_count() or 1, torch.get_num_threads()
        fewer = max(1, threads - math.ceil(mean - there))
        return (
            f"{mean:.1f} threads want to run on this machine's {_processors(there)}, {threads} of torch among them: "
            f"OMP_NUM_THREADS={fewer} may be many times as fast."
        )
