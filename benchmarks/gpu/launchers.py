"""The C code with which Triton launches kernels, compiled where there is no driver.

Up to Triton 3.6 each signature of a kernel has a launcher of its own, which Triton has the host's compiler build when
the kernel first runs, 0.3 s each. They need CUDA's driver library to link, and are kept beside the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

from triton.runtime import build


def prepare(kernel) -> None:
    """Have the kernel's launcher in Triton's cache; nothing to do where this Triton needs none."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher") and kernel is not None:
        _stub(Path(driver.__file__))
        _prepared(driver, tuple(kernel.src.signature.items()), kernel)


_done: set = set()


def _prepared(driver, signature: tuple, kernel) -> None:
    key = (signature, tuple(sorted(map(str, kernel.src.constants.items()))))
    if key in _done:
        return
    _done.add(key)
    for platform in _platforms():
        with mock.patch.object(build, "platform_key", lambda platform=platform: platform, create=True):
            driver.CudaLauncher(kernel.src, kernel.metadata)


@functools.cache
def _platforms() -> list[str]:
    """This platform by the names that Triton's keys may have for it: Python asks the program `file`, if it is there."""
    if not hasattr(build, "platform_key"):
        return [""]
    own = build.platform_key()
    return list(dict.fromkeys([own, own.removesuffix("ELF"), own.removesuffix("ELF") + "ELF"]))


@functools.cache
def _stub(driver: Path) -> None:
    """Load a library that has the names of CUDA's driver, and have Triton link against it."""
    from triton.backends.nvidia import driver as loaded

    text = driver.read_text(encoding="utf-8") + driver.with_name("driver.c").read_text(encoding="utf-8")
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", text)))
    folder = Path(tempfile.mkdtemp(prefix="seal-fast-driver-"))
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names), encoding="utf-8")
    compiler = os.environ.get("CC", "gcc")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library)  # for -lcuda of older releases
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    for cached in ("libcuda_dirs", "library_dirs"):
        getattr(loaded, cached).cache_clear()
    for platform in _platforms():
        with mock.patch.object(build, "platform_key", lambda platform=platform: platform, create=True):
            loaded.CudaUtils.instance = object.__new__(loaded.CudaUtils)
            loaded.CudaUtils()
