"""The native library with AddressSanitizer and UndefinedBehaviorSanitizer, of each instruction set that runs here.

    python tests/support/sanitize.py          builds it in a copy of the tree and runs the kernels' tests on it

It needs GCC on Linux. What a sanitizer finds ends the tests' process, and is shown.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import native
from seal_fast.kernels.launch import cpu

FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
TESTS = [
    *(f"test_{name}.py" for name in ("lif_cpu", "bn_lif_cpu", "seal_loss_cpu", "spike_conv_cpu", "native_sizes")),
    "test_packing.py::test_unpacking_gives_what_was_packed",
]


def missing() -> str:
    """Why nothing can be built here, or an empty string."""
    if cpu.library() is None:
        return cpu.missing()
    if sys.platform != "linux" or not _runtime("libasan.so"):
        return "GCC with AddressSanitizer is not here, or this is not Linux"
    return ""


def instruction_sets() -> list[str]:
    """Those that were compiled here and that this processor runs."""
    tells = {name: getattr(cpu.library(), f"seal_cpu_runs_{name}", None) for name in cpu.ISA}
    return [name for name, runs in tells.items() if runs is not None and runs()]


def check(folder: Path, isa: str, tests: list[str] | None = None) -> subprocess.CompletedProcess:
    """Build the library of a copy of the tree, and run tests of tests/kernels on it."""
    native.build(folder, FLAGS, isa, timeout=1200)
    environment = {
        "LD_PRELOAD": " ".join(_runtime(name) for name in ("libasan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(str(path) for path in (folder, native.ROOT / "tests/support")),
        "OMP_NUM_THREADS": "2",
    }
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", str(native.ROOT / "pyproject.toml")]
    # pytest keeps what a process writes, which would be lost where a sanitizer ends that.
    return subprocess.run(
        [*pytest, "-s", *(str(native.ROOT / "tests" / "kernels" / test) for test in tests or TESTS)],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )


def _runtime(name: str) -> str:
    """The path of one of GCC's libraries, or nothing."""
    try:
        found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
    return found if os.path.isabs(found) else ""


def main() -> int:
    """Check each instruction set; the exit code is 1 where something was found, and 2 where nothing can be built."""
    if missing():
        print(f"{missing()}.", file=sys.stderr)
        return 2
    failed = []
    for isa in instruction_sets():
        with tempfile.TemporaryDirectory() as folder:
            result = check(native.copied(Path(folder)), isa)
        print(f"{isa}: {result.stdout if result.returncode else result.stdout.strip().splitlines()[-1]}", flush=True)
        failed += [isa] if result.returncode else []
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
