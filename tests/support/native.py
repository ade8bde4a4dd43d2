"""Native libraries built from changed sources, in copies of the tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import seal_fast
from seal_fast import kernels

ROOT = Path(__file__).resolve().parents[2]


def copied(folder: Path) -> Path:
    """A copy in `folder` of what the library is built from and runs with; without the library."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "kernels", "train")
    shutil.copytree(Path(seal_fast.__file__).parent, folder / "seal_fast", ignore=ignored)
    shutil.copytree(kernels.__path__[0], folder / "kernels", ignore=ignored)
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "seal_fast" / "kernels").symlink_to(folder / "kernels")
    return folder


def changed(folder: Path, edits: dict[str, list[tuple[str, str]]]) -> None:
    """Replace texts in files of the copy's kernels; each must be there."""
    for name, pairs in edits.items():
        file = folder / "kernels" / name
        text = file.read_text(encoding="utf-8")
        for old, new in pairs:
            assert old in text, f"{name} has no {old!r}"
            text = text.replace(old, new)
        file.write_text(text, encoding="utf-8")


def build(folder: Path, flags: str, isa: str = "baseline", timeout: int = 600) -> Path:
    """The library that setup.py builds in the copy for these instruction sets, with more flags of the compiler."""
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | {"SEAL_FAST_ISA": isa, "SEAL_FAST_CXXFLAGS": flags},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    built = [*(folder / "kernels").glob("_cpu.*")]
    assert built, result.stdout + result.stderr
    return built[0]


def run(folder: Path, program: str, **environment: str) -> subprocess.CompletedProcess:
    """Python's output of `program` with the copy's library."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
