"""Options of the benchmarks, the machine in their results, and the tables at their end."""

from __future__ import annotations

import pytest
import torch

import measure
from seal_fast import reuse_freed_memory

TABLES = pytest.StashKey[dict]()  # section -> group -> lines
FIRST = pytest.StashKey[dict]()  # group -> seconds of its first contestant
SECTION = "best of all rounds; x: how many times slower than the first; share: of the copy bandwidth"


def pytest_addoption(parser):
    group = parser.getgroup("seal-fast")
    group.addoption("--tiny", action="store_true", help="smallest sizes: a check that the benchmarks run")
    group.addoption("--seconds", type=float, default=1.0, help="time for each contestant (default: 1)")


def pytest_configure(config):
    config.stash[TABLES], config.stash[FIRST] = {}, {}
    reuse_freed_memory()  # for every contestant alike


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(measure.machine())


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture
def report(request):
    """Adds a line to the tables at the end."""

    def add(section: str, group: str, line: str) -> None:
        request.config.stash[TABLES].setdefault(section, {}).setdefault(group, []).append(line)

    return add


@pytest.fixture
def contest(request, benchmark, report):
    """Times a step in its group: how long it takes, and how near that is to moving the least bytes at copy speed."""

    def run(group: str, contestant: str, step, *, floor_bytes: int, tensor_bytes: int):
        step = measure.synchronised(step)
        seconds = 0.0 if request.config.getoption("--tiny") else request.config.getoption("--seconds")
        benchmark.group = group
        benchmark.pedantic(step, rounds=measure.rounds(step, seconds, 3), warmup_rounds=2)
        best, median = benchmark.stats.stats.min, benchmark.stats.stats.median
        share = floor_bytes / best / measure.copy_bandwidth(tensor_bytes)
        benchmark.extra_info.update(contestant=contestant, share_of_copy_bandwidth=share)
        ratio = best / request.config.stash[FIRST].setdefault(group, best)
        times = f"{best * 1e3:10.3f} ms  (median {median * 1e3:10.3f})"
        report(SECTION, group, f"  {contestant:28s} {times} {ratio:8.2f}x {share:7.0%}")

    return run


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
