"""Options of the benchmarks, the machine in their results, and the tables at their end."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import NamedTuple

import pytest
import torch

import measure
from seal_fast import reuse_freed_memory

TABLES = pytest.StashKey[dict]()  # section -> group -> lines
RACED = pytest.StashKey[dict]()  # what is raced -> for each sweep so far, seconds by contestant
SECTION = (
    "best of all rounds, median (range of all but the outer tenths); x: how many times slower than the first, by both; "
    "share: of the copy bandwidth"
)


def pytest_addoption(parser):
    group = parser.getgroup("seal-fast")
    group.addoption("--tiny", action="store_true", help="smallest sizes: a check that the benchmarks run")
    group.addoption("--seconds", type=float, default=1.0, help="time for each contestant (default: 1)")
    group.addoption("--sweeps", type=int, default=1, help="parts of that time, all else between them (default: 1)")


def pytest_configure(config):
    config.stash[TABLES], config.stash[RACED] = {}, {}
    reuse_freed_memory()  # for every contestant alike


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(measure.machine())


def pytest_generate_tests(metafunc):
    sweeps = metafunc.config.getoption("--sweeps")
    if sweeps > 1 and "sweep_number" in metafunc.fixturenames:
        metafunc.parametrize("sweep_number", range(sweeps), ids=lambda number: f"sweep{number}")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.callspec.params.get("sweep_number", 0) if hasattr(item, "callspec") else 0)


@pytest.fixture
def sweep_number() -> int:
    return 0


class Sweep(NamedTuple):
    """One of the times that all benchmarks run, for other programs slow a machine for a minute or so."""

    number: int
    last: bool
    seconds: float  # of each contestant
    least: int  # rounds: of two runs alike, the ranges of three rounds each miss each other one time in ten


@pytest.fixture
def sweep(request, sweep_number, tiny) -> Sweep:
    sweeps = request.config.getoption("--sweeps")
    seconds = 0.0 if tiny else request.config.getoption("--seconds") / sweeps
    return Sweep(sweep_number, sweep_number == sweeps - 1, seconds, max(2, math.ceil(3 / sweeps)))


@pytest.fixture(scope="session")
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture(scope="session")
def report(request):
    """Adds a line to the tables at the end."""

    def add(section: str, group: str, line: str) -> None:
        request.config.stash[TABLES].setdefault(section, {}).setdefault(group, []).append(line)

    return add


@pytest.fixture
def timed(request, benchmark, sweep):
    """Has contestants timed in turn, once in each sweep, and shows one's times to pytest-benchmark in the last."""

    def run(key, race, contestant) -> dict[str, list[float]] | None:
        """Seconds of all sweeps by contestant; None before the last.

        Args:
            key: What is raced. The first test with it calls `race`, the others see the same times.
            race: Returns seconds by contestant, of those that fit into memory.
            contestant: Whose times are this benchmark's.
        """
        done = request.config.stash[RACED].setdefault(key, [])
        if len(done) == sweep.number:
            done.append(race())
        names = [name for name in done[0] if all(name in times for times in done)]
        if contestant not in names:
            # A contestant that does not fit has no figures; the others, which do, are still compared.
            pytest.skip("the GPU has too little memory")
        raced = {name: [seconds for times in done for seconds in times[name]] for name in names}
        benchmark.disabled = not sweep.last
        measure.readings = itertools.chain.from_iterable((0.0, seconds) for seconds in raced[contestant])
        benchmark.pedantic(lambda: None, rounds=len(raced[contestant]))
        return raced if sweep.last else None

    return run


@pytest.fixture
def contest(request, benchmark, report, timed, sweep):
    """Times the contestants of a group in turn, and shows one: its time, and how near that is to the least possible."""

    def run(group, contestant, prepare, *, floor_bytes=None, tensor_bytes=None, shown=None, **facts):
        benchmark.group = group
        times = timed(group, lambda: _race(prepare, _contestants(request), sweep), contestant)
        if times is None:
            return
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


def _race(prepare, contestants: list[str], sweep: Sweep) -> dict[str, list[float]]:
    """Makes the steps of contestants: seconds of each of their calls."""
    steps, make = {}, prepare()
    for contestant in contestants:
        try:
            step = make(contestant)
            measure.synchronised(step)()
            steps[contestant] = step
        except torch.cuda.OutOfMemoryError:
            continue
    return measure.race(steps, sweep.seconds, sweep.least, turn=min(sweep.seconds / 10, 0.02))


def pytest_terminal_summary(terminalreporter, config):
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
