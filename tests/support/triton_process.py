"""Tests in Triton's interpreter, in a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import seal_fast

TESTS = Path(__file__).parents[1]


def interpret(tmp_path, files: list[str], *options: str, at_least: int, timeout: int = 300) -> None:
    """Run the tests of these files whose backend is triton, and assert that all of so many ran and passed."""
    report = tmp_path / "report.xml"
    # Beside tests/seal_fast, pytest finds only a library that is on the path. So does a plugin what it imports.
    folders = [TESTS / "support", TESTS.parent / "benchmarks", Path(seal_fast.__file__).parents[1]]
    paths = [*folders, os.environ.get("PYTHONPATH", "")]
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
