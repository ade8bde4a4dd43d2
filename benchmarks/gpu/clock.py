"""Time on the GPU by events, what the host takes to launch it, and which kernels ran."""

from __future__ import annotations

import collections
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType

from gpu import record

WARM_UP = 3  # calls before the first that is timed
LAUNCHES = 10  # calls whose launches are timed together, where they do not fill the GPU's queue of about 1,000
SLEEP = 4_000_000  # cycles of sleep for each millisecond of the host: two, at the 2 GHz of a Hopper GPU or less


def operator(run: Callable[[], object], seconds: float = 0.2) -> dict[str, float]:
    """Milliseconds that the GPU takes for the kernels of `run`, median and best, and the host to launch them.

    The GPU is kept busy while the host launches, so that it is not the host that is timed; but it is where `run` waits
    for the GPU, as the published loss does. The caches are as the call before leaves them: the data of a call should
    be several times the L2 cache.
    """
    return _timed(run, seconds, LAUNCHES, asleep=True)


def step(run: Callable[[], object], seconds: float = 1.0) -> dict[str, float]:
    """Milliseconds of `run` on a GPU that waits for the host, from the first launch to the last kernel's end."""
    return _timed(run, seconds, 1, asleep=False)


def kernels(run: Callable[[], object], calls: int = 20) -> list[tuple[str, float, float]]:
    """What the GPU runs for a call of `run`, by the profiler, which slows down what its process times afterwards.

    Returns:
        Each kernel's name, how often a call launches it, and the microseconds of all these launches, the mean of the
        calls; the longest first.
    """
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            found[event.name].append(event.time_range.elapsed_us())
    rows = [(name[:120], len(times) / calls, round(sum(times) / calls, 1)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def captured(run: Callable[[], object], warm_up: int = 3) -> Callable[[], object]:
    """`run` as one CUDA graph, after as many calls as it takes to compile and to choose kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def forget() -> None:
    """Free what nothing uses, and begin to watch the peak of memory."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _timed(run, seconds: float, launches: int, *, asleep: bool) -> dict[str, float]:
    seconds = record.seconds(seconds)
    for _ in range(WARM_UP if seconds else 0):
        run()
    host = _host(run, launches) if seconds else 0.0
    torch.cuda.synchronize()
    times, begun = [], time.perf_counter()
    while not times or (len(times) < 500 and time.perf_counter() - begun < seconds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if asleep:
            torch.cuda._sleep(int(SLEEP * max(host, 0.1)))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"ms": statistics.median(times), "best_ms": min(times), "rounds": len(times), "host_ms": host}


def _host(run, launches: int) -> float:
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(launches):
            run()
        times.append((time.perf_counter() - begun) / launches * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)
