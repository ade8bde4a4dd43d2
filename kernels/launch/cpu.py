"""The native library of CPU kernels: found, and bound for the best instruction set that this processor runs."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from pathlib import Path

import torch

ISA = ("baseline", "avx2", "avx512")  # worst first; setup.py compiles each room once for each
LIBRARY = "_cpu"

# torch dtype -> number of the type in the native code
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library that setup.py built, or None where there was no compiler.

    Its OpenMP calls are served by the runtime that torch has loaded, so both share one pool of threads.
    """
    folder = Path(__file__).resolve().parents[1]
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{LIBRARY}{suffix}"
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # built on a machine with other libraries
                return None
    return None


@functools.cache
def isa() -> str:
    """The best compiled instruction set that this processor runs."""
    compiled = [name for name in ISA if hasattr(library(), f"seal_cpu_runs_{name}")]
    return [name for name in compiled if getattr(library(), f"seal_cpu_runs_{name}")()][-1]


@functools.cache
def function(name: str):
    """The native function `name`, which takes a pointer to its arguments and returns 0."""
    native = getattr(library(), f"{name}_{isa()}")
    native.restype = ctypes.c_int
    return native


def run(name: str, arguments: ctypes.Structure) -> None:
    """Call the native function `name` with a pointer to its arguments."""
    if function(name)(ctypes.byref(arguments)) != 0:
        raise RuntimeError(f"{name} has no code for this dtype.")


def missing() -> str:
    """Why the library cannot be used, or an empty string."""
    if library() is None:
        return "the native library was not built; install seal-fast where a C++17 compiler is found"
    return ""
