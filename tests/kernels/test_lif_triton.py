"""The Triton kernels of the LIF neuron in Triton's interpreter, so without a GPU.

Triton reads TRITON_INTERPRET when a kernel is defined, so the interpreter has a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import seal_fast

pytest.importorskip("triton", reason="Triton is not installed")

TESTS = Path(__file__).parents[1]
SHARED = ["kernels/test_lif_forward.py", "kernels/test_lif_gradients.py", "seal_fast/test_golden_operators.py"]


def interpret(tmp_path, files: list[str], *options: str, at_least: int, timeout: int = 300) -> None:
    """Run the tests of these files whose backend is triton, and assert that all of so many ran and passed."""
    report = tmp_path / "report.xml"
    # Beside tests/seal_fast, pytest finds only a library that is on the path.
    paths = [TESTS / "support", Path(seal_fast.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "triton_on_cpu", "-p", "no:cacheprovider", "-k", "triton"),
            *(f"--junitxml={report}", "--color=no", *options, *(str(TESTS / file) for file in files)),
        ],
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) >= at_least
    assert [suite.get(what) for what in ("failures", "errors", "skipped")] == ["0"] * 3, result.stdout


def test_shared_tests_of_the_operator(tmp_path):
    # That one test has 40,000 neurons for 64 steps, which take the interpreter a minute.
    interpret(tmp_path, SHARED, "-k", "triton and not keeps_a_float32_state", at_least=200)


def test_values(tmp_path):
    interpret(tmp_path, ["kernels/test_lif_triton_values.py"], at_least=160)


@pytest.mark.long
def test_values_of_more_runs(tmp_path):
    interpret(tmp_path, ["kernels/test_lif_triton_values.py"], "-m", "long", at_least=1, timeout=3600)
