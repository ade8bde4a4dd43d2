"""A worker of pytest-xdist that saw a sticky CUDA error ends, and nothing but the test that saw it fails."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpu import sticky

pytest.importorskip("xdist", reason="pytest-xdist, whose workers end, is not installed")

ILLEGAL = "CUDA error: an illegal memory access was encountered"
TESTS = """
import os
import pathlib
import pytest

lost = []

def accelerator_error(text):
    import torch

    return getattr(torch, "AcceleratorError", RuntimeError)(text)  # torch 2.6 has none

@pytest.mark.parametrize("number", range(10))
def test_each(number):
    with open(pathlib.Path(__file__).parent / "log", "a") as file:
        file.write(f"{{pathlib.Path(__file__).stem}} {{number}} {{os.getpid()}}\\n")
    assert not lost, "this process can do nothing more"
    if number == {fails}:
        lost.append(number)
        raise {error}
"""


def run(tmp_path, error: str, *options: str, fails: int = 3) -> tuple[list[str], list[list[str]], str]:
    """Messages of failed tests; the file, number and process of each test that ran, in their order; and the output."""
    for part in ("first", "second"):
        (tmp_path / f"test_{part}.py").write_text(TESTS.format(error=error, fails=fails if part == "first" else -1))
    benchmarks = str(Path(sticky.__file__).parents[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={tmp_path / 'report.xml'}"]
    result = subprocess.run(
        [*command, *options],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, [benchmarks, os.environ.get("PYTHONPATH")]))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    failures = [failure.get("message") for failure in ElementTree.parse(tmp_path / "report.xml").iter("failure")]
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    return failures, log, result.stdout


@pytest.mark.parametrize(
    ("error", "dist"),
    [
        (f"accelerator_error({ILLEGAL!r})", "load"),
        (f"RuntimeError({ILLEGAL!r})", "loadfile"),
        (f"RuntimeError({ILLEGAL!r})", "worksteal"),
    ],
)
def test_the_worker_ends_and_all_other_tests_pass_elsewhere(tmp_path, error, dist):
    failures, log, output = run(tmp_path, error, "-n", "2", "--dist", dist, "-p", "gpu.sticky")
    assert len(failures) == 1, output
    assert ILLEGAL in failures[0]
    assert "1 failed, 19 passed" in output
    ran = [(file, number) for file, number, _ in log]
    assert len(set(ran)) == len(ran) == 20  # each once
    (lost,) = {process for file, number, process in log if (file, number) == ("test_first", "3")}
    last = [(file, number) for file, number, process in log if process == lost][-1]
    assert last == ("test_first", "3")
    assert "replacing crashed worker" in output


def test_the_last_test_of_all_may_see_the_error(tmp_path):
    options = ("-n", "1", "-p", "gpu.sticky", "test_first.py")
    failures, _, output = run(tmp_path, f"RuntimeError({ILLEGAL!r})", *options, fails=9)
    assert len(failures) == 1
    assert "1 failed, 9 passed" in output


def test_without_the_plugin_later_tests_fail_too(tmp_path):
    failures, _, _ = run(tmp_path, f"RuntimeError({ILLEGAL!r})", "-n", "1", "test_first.py")
    assert len(failures) == 7


def test_other_errors_do_not_end_a_worker(tmp_path):
    _, log, output = run(tmp_path, "RuntimeError('CUDA error: invalid argument')", "-n", "1", "-p", "gpu.sticky")
    assert len({process for _, _, process in log}) == 1
    assert "replacing crashed worker" not in output


def test_without_xdist_nothing_ends(tmp_path):
    _, log, output = run(tmp_path, f"RuntimeError({ILLEGAL!r})", "-p", "gpu.sticky", "test_first.py")
    assert len(log) == 10
    assert "7 failed, 3 passed" in output


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("CUDA error: out of memory"), False),
        (ValueError("an illegal memory access, of whatever kind"), False),
    ],
    ids=str,
)
def test_errors_are_told_apart(error, stays):
    assert sticky.is_sticky(error) == stays
    raised = AssertionError("the kernel failed")
    raised.__cause__ = error
    assert sticky.is_sticky(raised) == stays
