"""Options of the benchmarks, the machine in their results, and the tables at their end."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import measure
from seal_fast import reuse_freed_memory

TABLES = pytest.StashKey[dict]()  # section -> group -> lines
POOL = pytest.StashKey[dict]()  # what was measured: see --pool
RACED = pytest.StashKey[set]()  # keys of what this run has timed
SECTION = (
    "best of all rounds, median (range of all but the outer tenths); x: how many times slower than the first, by both; "
    "share: of the copy bandwidth"
)


def pytest_addoption(parser):
    group = parser.getgroup("seal-fast")
    group.addoption("--tiny", action="store_true", help="smallest sizes: a check that the benchmarks run")
    group.addoption("--seconds", type=float, default=1.0, help="time for each contestant (default: 1)")
    group.addoption(
        "--pool",
        type=Path,
        metavar="FILE",
        help="add the times to those of earlier runs in FILE, and show those of all: the spread of one run of a few "
        "minutes does not know how a process, or the programs of others, make it differ from the next",
    )


def pytest_configure(config):
    path = config.getoption("--pool")
    known = path is not None and path.exists()
    config.stash[POOL] = json.loads(path.read_text(encoding="utf-8")) if known else {"times": {}, "facts": {}}
    config.stash[TABLES], config.stash[RACED] = {}, set()
    reuse_freed_memory()  # for every contestant alike


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(measure.machine())


def pytest_sessionfinish(session):
    path = session.config.getoption("--pool")
    if path is not None:
        path.write_text(json.dumps(session.config.stash[POOL]), encoding="utf-8")


@pytest.fixture(scope="session")
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture(scope="session")
def report(request):
    """Adds a line to the tables at the end."""

    def add(section: str, group: str, line: str) -> None:
        request.config.stash[TABLES].setdefault(section, {}).setdefault(group, []).append(line)

    return add


class Effort(NamedTuple):
    """How long contestants are timed."""

    seconds: float  # each
    least: int  # rounds


@pytest.fixture(scope="session")
def effort(request, tiny) -> Effort:
    pooled = request.config.getoption("--pool") is not None
    return Effort(0.0 if tiny else request.config.getoption("--seconds"), 2 if pooled else 3)


@pytest.fixture(scope="session")
def facts(request) -> dict:
    """What is measured once in all runs of a pool, of numbers and texts, by group."""
    return request.config.stash[POOL]["facts"]


@pytest.fixture
def timed(request, benchmark):
    """Has contestants timed in turn, once in a run, and hands the times of one to pytest-benchmark."""

    def run(key, race, contestant) -> dict[str, list[float]]:
        """Seconds by contestant, of all runs of the pool.

        Args:
            key: What is raced. The first test with it calls `race`, the others see the same times.
            race: Returns seconds by contestant, of those that fit into memory.
            contestant: Whose times are this benchmark's.
        """
        runs = request.config.stash[POOL]["times"].setdefault(key, [])
        if key not in request.config.stash[RACED]:
            runs.append(race())
            request.config.stash[RACED].add(key)
        names = [name for name in runs[0] if all(name in times for times in runs)]
        if contestant not in names:
            # A contestant that does not fit has no figures; the others, which do, are still compared.
            pytest.skip("the GPU has too little memory")
        raced = {name: [seconds for times in runs for seconds in times[name]] for name in names}
        measure.readings = itertools.chain.from_iterable((0.0, seconds) for seconds in raced[contestant])
        benchmark.pedantic(lambda: None, rounds=len(raced[contestant]))
        return raced

    return run


@pytest.fixture
def contest(request, benchmark, report, timed, effort):
    """Times the contestants of a group in turn, and shows one: its time, and how near that is to the least possible."""

    def run(group, contestant, prepare, *, floor_bytes=None, tensor_bytes=None, shown=None, **facts):
        benchmark.group = group
        times = timed(group, lambda: _race(prepare, _contestants(request), effort), contestant)
        name, own, first = shown or contestant, times[contestant], next(iter(times.values()))
        low, high = measure.spread(own)
        benchmark.extra_info.update(contestant=name, low=low, high=high, **facts)
        best, median = min(own), statistics.median(own)
        times_shown = f"{best * 1e3:9.3f} ms, median {median * 1e3:9.3f} ({low * 1e3:.3f} to {high * 1e3:.3f})"
        line = f"  {name:28s} {times_shown:54s} {best / min(first):8.2f}x {median / statistics.median(first):8.2f}x"
        if floor_bytes is not None:
            share = floor_bytes / best / measure.copy_bandwidth(tensor_bytes)
            benchmark.extra_info["share_of_copy_bandwidth"] = share
            line += f" {share:7.0%}"
        report(SECTION, group, line)

    return run


def _contestants(request) -> list[str]:
    """The contestants of this test's group that are to run."""
    own = {**request.node.callspec.params, "contestant": None}
    items = [item for item in request.session.items if item.originalname == request.node.originalname]
    return [
        item.callspec.params["contestant"]
        for item in items
        if item.path == request.node.path and {**item.callspec.params, "contestant": None} == own
    ]


def _race(prepare, contestants: list[str], effort: Effort) -> dict[str, list[float]]:
    """Makes the steps of contestants: seconds of each of their calls."""
    steps, make = {}, prepare()
    for contestant in contestants:
        try:
            step = make(contestant)
            measure.synchronised(step)()
            steps[contestant] = step
        except torch.cuda.OutOfMemoryError:
            continue
    return measure.race(steps, *effort, turn=min(effort.seconds / 10, 0.02))


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("benchmark_disable"):
        return
    facts = measure.machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    for section, groups in config.stash[TABLES].items():
        terminalreporter.section(section)
        terminalreporter.write_line(f"{facts.get('gpu') or facts['cpu']}; {versions}")
        for group, lines in groups.items():
            terminalreporter.write_line(f"\n{group}")
            for line in lines:
                terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def fresh_compilations():
    """torch.compile gives up on a function after a few shapes; each benchmark has one."""
    yield
    torch._dynamo.reset()
