"""Options of the benchmarks, the machine in their results, and the tables at their end."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch

import measure
from seal_fast import reuse_freed_memory

TABLES = pytest.StashKey[dict]()  # section -> group -> lines
RACED = pytest.StashKey[dict]()  # group -> steps and seconds by contestant
SECTION = (
    "best of all rounds, median (range of all but the outer tenths); x: how many times slower than the first, by both; "
    "share: of the copy bandwidth"
)


def pytest_addoption(parser):
    group = parser.getgroup("seal-fast")
    group.addoption("--tiny", action="store_true", help="smallest sizes: a check that the benchmarks run")
    group.addoption("--seconds", type=float, default=1.0, help="time for each contestant (default: 1)")


def pytest_configure(config):
    config.stash[TABLES], config.stash[RACED] = {}, {}
    reuse_freed_memory()  # for every contestant alike


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(measure.machine())


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
def contest(request, benchmark, report, tiny):
    """Times the contestants of a group in turn, and shows one: its time, and how near that is to the least possible.

    The group's first test makes and times the steps of all its contestants; the others show what was found.
    """

    def run(group, contestant, prepare, *, floor_bytes=None, tensor_bytes=None, shown=None, **facts):
        raced = request.config.stash[RACED]
        if group not in raced:
            seconds = 0.0 if tiny else request.config.getoption("--seconds")
            raced[group] = _race(prepare, _contestants(request), seconds)
        steps, times = raced[group]
        if contestant not in times:
            # A contestant that does not fit has no figures; the others, which do, are still compared.
            pytest.skip("the GPU has too little memory")
        if contestant == list(times)[-1]:
            steps.clear()  # and with them the memory that they hold
        name, own, first = shown or contestant, times[contestant], next(iter(times.values()))
        benchmark.group = group
        measure.readings = itertools.chain.from_iterable((0.0, seconds) for seconds in own)
        benchmark.pedantic(lambda: None, rounds=len(own))
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


def _race(prepare, contestants: list[str], seconds: float) -> tuple[dict, dict[str, list[float]]]:
    """Steps by contestant, and how long each of their calls took."""
    steps, make = {}, prepare()
    for contestant in contestants:
        try:
            step = make(contestant)
            measure.synchronised(step)()
            steps[contestant] = step
        except torch.cuda.OutOfMemoryError:
            continue
    return steps, measure.race(steps, seconds, 3, turn=min(seconds / 10, 0.02))


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
