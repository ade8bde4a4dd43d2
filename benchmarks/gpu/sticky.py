"""A plugin of pytest (-p gpu.sticky): a worker of pytest-xdist that saw one of CUDA's sticky errors is replaced.

After an illegal address or a failed assertion on the device, every call to CUDA fails in that process, and with it
every later test. The worker ends before its next test, when what failed has been reported; that next test, which
pytest-xdist takes for one that crashed, is run by another worker. Without pytest-xdist the plugin does nothing.
"""

from __future__ import annotations

import contextlib
import os

import pytest

# As CUDA's runtime and driver name what only the end of the process cures; torch, Triton and CuPy hand it on.
STICKY = (
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "device-side assert",
    "device-side assertion",
    "unspecified launch failure",
    "launch failed",
    "launch timed out",
    "invalid program counter",
    "hardware stack error",
    "operation not supported on global/shared address space",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "MPS client",
    "context is destroyed",
    "STATUS_EXECUTION_FAILED",  # of cuBLAS and cuDNN, which may be the first to be asked after it
)


def is_sticky(error: BaseException | None) -> bool:
    """Whether the error, or one that it was raised from or while handling, is a CUDA error that stays."""
    while error is not None:
        text = str(error).lower()
        named = f"{type(error).__name__} {text}".lower()
        if any(name in named for name in ("cuda", "cudnn")) and any(phrase.lower() in text for phrase in STICKY):
            return True
        error = error.__cause__ or error.__context__
    return False


class Worker:
    """Ends the process before the test after one with a sticky error."""

    def __init__(self):
        self.is_lost = False

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Mark the report for the controller."""
        outcome = yield
        if call.excinfo is not None and is_sticky(call.excinfo.value):
            self.is_lost = outcome.get_result().sticky_error = True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        """End without what Python does at exit, which would call CUDA again."""
        if self.is_lost:
            os._exit(1)


class Controller:
    """Has the test that a lost worker would have run next run by another."""

    def __init__(self):
        self.lost, self.failed = set(), set()

    def pytest_runtest_logreport(self, report):
        """Remember which workers are lost, and with which tests."""
        if getattr(report, "sticky_error", False):
            self.lost.add(report.node)
            self.failed.add(report.nodeid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem, report, sched):
        """Let the report of a crash say nothing, and the test be scheduled again where that does not happen anyway."""
        if report.node not in self.lost:
            return
        report.outcome, report.when, report.longrepr = "passed", "setup", None
        if crashitem not in self.failed:
            # --dist loadscope and loadfile have no such method, and hand on all that a worker had not completed.
            with contextlib.suppress(NotImplementedError):
                sched.mark_test_pending(crashitem)


def pytest_configure(config):
    """A worker of pytest-xdist has an input; the process that controls workers has a number of them."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(), "sticky_worker")
    elif getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(Controller(), "sticky_controller")
