"""Time on the GPU by events, and what the host takes to launch it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from gpu import record

WARM_UP = 3  # calls before the first that is timed
LAUNCHES = 10  # calls whose launches are timed together: too few to fill the queue of the GPU


def milliseconds(run: Callable[[], object], seconds: float = 0.2) -> dict[str, float]:
    """Median and best of the milliseconds that the GPU takes for `run`, over so many seconds, and the host's median.

    The caches are as the call before leaves them, so the data of a call should be several times the L2 cache.
    """
    seconds = record.seconds(seconds)
    for _ in range(WARM_UP if seconds else 0):
        run()
    torch.cuda.synchronize()
    times, begun = [], time.perf_counter()
    while not times or (len(times) < 500 and time.perf_counter() - begun < seconds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    found = {"ms": statistics.median(times), "best_ms": min(times), "rounds": len(times)}
    return found | ({"host_ms": _host(run)} if seconds else {})


def _host(run: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(LAUNCHES):
            run()
        times.append((time.perf_counter() - begun) / LAUNCHES * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)
