"""Options of the benchmarks, the machine in their results, and the table of ratios at their end."""

from __future__ import annotations

import pytest
import torch

import measure
from seal_fast import reuse_freed_memory

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("seal-fast")
    group.addoption("--tiny", action="store_true", help="smallest sizes: a check that the benchmarks run")
    group.addoption("--seconds", type=float, default=1.0, help="time for each contestant (default: 1)")


def pytest_configure(config):
    config.stash[ROWS] = []
    reuse_freed_memory()  # for every contestant alike


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(measure.machine())


@pytest.fixture
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture
def contest(request, benchmark):
    """Times a step in its group: how long it takes, and how near that is to moving the least bytes at copy speed."""

    def run(group: str, contestant: str, step, *, floor_bytes: int, tensor_bytes: int):
        step = measure.synchronised(step)
        seconds = 0.0 if request.config.getoption("--tiny") else request.config.getoption("--seconds")
        benchmark.group = group
        benchmark.pedantic(step, rounds=measure.rounds(step, seconds, 3), warmup_rounds=2)
        best = benchmark.stats.stats.min
        share = floor_bytes / best / measure.copy_bandwidth(tensor_bytes)
        benchmark.extra_info.update(contestant=contestant, share_of_copy_bandwidth=share)
        request.config.stash[ROWS].append((group, contestant, best, benchmark.stats.stats.median, share))

    return run


def pytest_terminal_summary(terminalreporter, config):
    groups: dict[str, list] = {}
    for group, *row in config.stash[ROWS]:
        groups.setdefault(group, []).append(row)
    if not groups:
        return
    facts = measure.machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    terminalreporter.section(
        "best of all rounds; x: how many times slower than the first; share: of the copy bandwidth"
    )
    terminalreporter.write_line(f"{facts.get('gpu') or facts['cpu']}; {versions}")
    for group, rows in groups.items():
        terminalreporter.write_line(f"\n{group}")
        for contestant, best, median, share in rows:
            ratio = best / rows[0][1]
            terminalreporter.write_line(
                f"  {contestant:28s} {best * 1e3:10.3f} ms  (median {median * 1e3:10.3f}) {ratio:8.2f}x {share:7.0%}"
            )


@pytest.fixture(autouse=True)
def fresh_compilations():
    """torch.compile gives up on a function after a few shapes; each benchmark has one."""
    yield
    torch._dynamo.reset()
