"""A plugin of pytest (-p gpu.outcomes) that writes each failed test as it fails, and how many passed in the end.

The stage is named by the environment: pytest's own options are left to the tests.
"""

from __future__ import annotations

import collections
import os

import pytest

from gpu import record

STAGE = "SEAL_FAST_GPU_STAGE"


def pytest_configure(config) -> None:
    """Listen where reports arrive: in the process that hands tests to workers, or in the only one."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Outcomes(os.environ.get(STAGE, "tests")))


class _Outcomes:
    def __init__(self, stage: str):
        self.stage = stage
        self.counts: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", None) or str(report.longrepr)
            record.write(stage=self.stage, test=report.nodeid, failed=record.shortened(message))
            self.counts["failed"] += 1
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            record.write(stage=self.stage, test=report.nodeid, failed=record.shortened(str(report.longrepr)))
            self.counts["failed"] += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        record.write(stage=self.stage, counts=dict(self.counts))
