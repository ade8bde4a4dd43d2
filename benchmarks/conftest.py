"""Options of the benchmarks, the machine in their results, and the tables at their end."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import figures
import measure
from seal_fast import reuse_freed_memory

TABLES = pytest.StashKey[dict]()  # section, "title; what its columns are" -> group -> lines
POOL = pytest.StashKey[dict]()  # what was measured, and what raised: see --pool
RACED = pytest.StashKey[set]()  # keys of what this run has timed
SECTION = (
    "kernels; time: median (range of all but the outer tenths), best; x: times that of the first in the same round; "
    "%: of the bandwidth of a copy in the same round"
)
COPY = "copy"  # a contestant of each group with a floor, which is not shown


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
    new = {"times": {}, "facts": {}, "failed": {}}
    config.stash[POOL] = json.loads(path.read_text(encoding="utf-8")) if known else new
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


@pytest.fixture(scope="session")
def seconds(request, tiny) -> float:
    """How long each contestant is timed."""
    return 0.0 if tiny else request.config.getoption("--seconds")


@pytest.fixture(scope="session")
def facts(request) -> dict:
    """What the runs of a pool tell each other beside times, of numbers and texts, by group."""
    return request.config.stash[POOL]["facts"]


@pytest.fixture
def timed(request, benchmark, report):
    """Has contestants timed in turn, once in a run, and hands the times of one to pytest-benchmark."""

    def run(section, group, contestants, race, contestant, *, key=None, shown=None, alone=True) -> dict[str, list]:
        """Seconds by contestant, of all runs of the pool.

        A contestant that raised in one of them has no times: its test fails with its error, and the table says why.

        Args:
            section: Of the table.
            group: What is raced.
            contestants: All of them, the first of them being the one that the others are compared with.
            race: Is called by the first test of the group, with the contestants and a dict for the `measure.Failure` of
                each that raises; returns seconds by contestant of the others.
            contestant: Whose times are this benchmark's: they, and how they compare with the first's, are noted.
            key: What is raced, where that is not the group.
            shown: The contestant's name in the table.
            alone: Whether its figures need no other contestant's times.
        """
        pool, key = request.config.stash[POOL], key or group
        runs, failed = pool["times"].setdefault(key, []), pool["failed"].setdefault(key, {})
        if key not in request.config.stash[RACED]:
            request.config.stash[RACED].add(key)
            entrants, found = [name for name in contestants if name not in failed], {}
            try:
                runs.append(race(entrants, found))
            except Exception as error:  # before the first contestant's turn
                runs.append({})
                found = dict.fromkeys(entrants, measure.Failure.of(error))
            failed.update(found)
        for name in [contestant] if alone else contestants:
            if name in failed:
                _no_figures(report, section, group, shown or contestant, measure.Failure(*failed[name]))
        names = [name for name in runs[0] if all(name in times for times in runs)]
        if contestant not in names:
            # A ratio is taken within each process, so that one which lacks a contestant leaves nothing to compare.
            pytest.skip("not every run of the pool has timed it")
        raced = {name: [seconds for times in runs for seconds in times[name]] for name in names}
        measure.readings = itertools.chain.from_iterable((0.0, seconds) for seconds in raced[contestant])
        benchmark.pedantic(lambda: None, rounds=len(raced[contestant]))
        first = contestants[0]
        benchmark.extra_info.update(first=first, time=figures.figure(raced[contestant]))
        if first in names and contestant != first:
            benchmark.extra_info["time_of_first"] = figures.ratio(raced[contestant], raced[first])
        return raced

    return run


def _no_figures(report, section: str, group: str, contestant: str, failure: measure.Failure) -> None:
    """End the test of a contestant that raised, and say so in the table."""
    if failure.out_of_memory:
        report(section, group, f"  {contestant:28s} has no figures: the GPU has too little memory")
        # A size for larger GPUs says nothing about the code.
        pytest.skip("the GPU has too little memory")
    report(section, group, f"  {contestant:28s} failed: {failure.line()}")
    pytest.fail(f"{failure.reason}\n\n{failure.trace}", pytrace=False)


@pytest.fixture
def contest(request, benchmark, report, timed, seconds):
    """Times the contestants of a group in turn, and shows one: its time, and how near that is to the least possible."""

    def run(group, contestant, prepare, *, floor_bytes=None, tensor_bytes=None, shown=None, note="", **facts):
        name, extra, contestants = shown or contestant, benchmark.extra_info, _contestants(request)
        benchmark.group = group
        extra.update(contestant=name, **facts)

        def race(entrants, failed):
            return _race(prepare, entrants, failed, tensor_bytes, seconds)

        times = timed(SECTION, group, contestants, race, contestant, shown=name)
        own, relative = times[contestant], extra.get("time_of_first")
        cells = f"{extra['time'].shown('9.3f', 1e3)} ms, best {1e3 * min(own):.3f}"
        of_first = "1.00" if contestant == contestants[0] else relative.shown("7.2f") if relative else "-"
        line = f"  {name:28s} {cells:50s} {of_first:>7s} x"
        if COPY in times:
            share = figures.ratio(times[COPY], own, floor_bytes / (2 * tensor_bytes))
            extra["share_of_copy_bandwidth"] = share
            line = f"{line:108s} {share.shown('4.0f', 100)} %"
        report(SECTION, group, f"{line}  {note}".rstrip())

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


def _race(
    prepare, contestants: list[str], failed: dict, tensor_bytes: int | None, seconds: float
) -> dict[str, list[float]]:
    """Makes the steps of contestants, and a copy of `tensor_bytes` where there are: seconds of each of their calls."""
    steps, make = {}, prepare()
    for contestant in [*contestants, *([COPY] if tensor_bytes is not None else [])]:
        with measure.noting(failed, contestant):
            step = measure.copying(tensor_bytes) if contestant == COPY else make(contestant)
            measure.synchronised(step)()
            steps[contestant] = step
    return measure.race(steps, seconds, turn=min(seconds / 10, 0.02), failed=failed)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("benchmark_disable"):
        return
    facts = measure.machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    for section, groups in config.stash[TABLES].items():
        title, _, columns = section.partition("; ")
        terminalreporter.section(title)
        terminalreporter.write_line(columns)
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
