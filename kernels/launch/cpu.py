"""The native library of CPU kernels: found, and bound for the best instruction set that this processor runs.

Structs and enumerations are written in C++ alone. The library tells their text (export.h), by which arguments are laid
out and names are numbered here, so that another version's library is refused or read as it is.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import re
from pathlib import Path

import torch

from . import sources
from .enumerations import known, parse

ISA = ("baseline", "avx2", "avx512")  # worst first; setup.py compiles each room once for each
LIBRARY = "_cpu"

_NOT_BUILT = "the native library was not built; install seal-fast where a C++17 compiler is found"
_NOT_LOADED = "the native library cannot be loaded here; install seal-fast again"
_OTHER_SOURCES = "the native library was built from other sources than lie beside it; install seal-fast again"
_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "int32_t": ctypes.c_int32}


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    folder = Path(__file__).resolve().parents[1]
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"{LIBRARY}{suffix}"
        if not path.exists():
            continue
        try:
            native = ctypes.CDLL(str(path))
        except OSError:  # built on a machine with other libraries
            return None, _NOT_LOADED
        return (native, "") if _is_current(native, folder) else (None, _OTHER_SOURCES)
    return None, _NOT_BUILT


def _is_current(native: ctypes.CDLL, folder: Path) -> bool:
    """Whether the library was built from the sources in the folder; those of an installation may have been removed."""
    expected = sources.digest(folder)
    for tell in (getattr(native, f"seal_cpu_sources_{name}", None) for name in _compiled(native)):
        digest = ctypes.c_uint64()
        if tell is None:  # a version that did not know its sources
            return False
        tell(ctypes.byref(digest))
        if expected not in (0, digest.value):
            return False
    return True


def _compiled(native: ctypes.CDLL) -> list[str]:
    return [name for name in ISA if hasattr(native, f"seal_cpu_runs_{name}")]


def library() -> ctypes.CDLL | None:
    """The library that setup.py built, or None where `missing` has a reason.

    Its OpenMP calls are served by the runtime that torch has loaded, so both share one pool of threads.
    """
    return _found()[0]


def missing() -> str:
    """Why the library cannot be used, or an empty string."""
    return _found()[1]


@functools.cache
def isa() -> str:
    """The best compiled instruction set that this processor runs; of those that SEAL_FAST_ISA names, if it is set.

    Raises:
        ValueError: None of those runs here.
    """
    able = [name for name in _compiled(library()) if getattr(library(), f"seal_cpu_runs_{name}")()]
    wanted = os.environ.get("SEAL_FAST_ISA")
    chosen = [name for name in able if not wanted or name in wanted.split(",")]
    if not chosen:
        raise ValueError(
            f"SEAL_FAST_ISA must name one of {', '.join(able)}, with commas between several; got {wanted}."
        )
    return chosen[-1]


@functools.cache
def function(name: str):
    """The native function `name`, which takes a pointer to its arguments and returns a Status."""
    native = getattr(library(), f"{name}_{isa()}")
    native.restype = ctypes.c_int
    return native


def run(name: str, arguments: ctypes.Structure) -> None:
    """Call the native function `name` with a pointer to its arguments.

    Raises:
        MemoryError: A thread's memory, which grows with the time steps, is more than there is.
        RuntimeError: It has no code for a number among the arguments.
    """
    status = function(name)(ctypes.byref(arguments))
    if not status:
        return
    if status == code("Status", "no_memory"):
        steps = f" for {arguments.T} time steps" if hasattr(arguments, "T") else ""
        raise MemoryError(f"{name} finds too little memory{steps}.")
    raise RuntimeError(f"{name} has no code for this dtype, or for another of its arguments.")


def _text(name: str) -> tuple[str, int]:
    """The text of a struct or an enumeration, and its size."""
    text = ctypes.c_char_p()
    size = getattr(library(), f"seal_text_{name}_{isa()}")(ctypes.byref(text))
    return text.value.decode(), size


@functools.cache
def structure(name: str) -> type[ctypes.Structure]:
    """The C++ struct `name`, which takes its fields by name and no others; without the library, it cannot be made."""
    if library() is None:
        return type(name, (_Unknown,), {"__slots__": ()})
    text, size = _text(name)
    fields = []
    for group in filter(None, map(str.strip, text.split(";"))):
        kind, declared = re.fullmatch(r"(?:const )?(\w+)(.+)", group).groups()
        for field in declared.split(","):
            held = ctypes.c_void_p if "*" in field else _TYPES.get(kind) or structure(kind)
            fields.append((field.strip("* "), held))
    made = type(name, (ctypes.Structure,), {"_fields_": tuple(fields), "__slots__": ()})
    if ctypes.sizeof(made) != size:
        raise RuntimeError(f"{name} has {size} bytes in the native library, and {ctypes.sizeof(made)} by its text.")
    return made


class _Unknown(ctypes.Structure):
    __slots__ = ()

    def __init__(self, **_fields):
        raise RuntimeError(f"{type(self).__name__} is not known: {missing()}.")


@functools.cache
def names(enumeration: str) -> tuple[str, ...]:
    """What the C++ enumeration counts, in lower case; nothing without the library."""
    return () if library() is None else parse(_text(enumeration)[0])


@functools.cache
def code(enumeration: str, name: str) -> int:
    """The number that `name` has in the C++ enumeration.

    Raises:
        ValueError: It has none.
    """
    return names(enumeration).index(known(name, enumeration, names(enumeration), "cpu"))


# torch dtype -> number of the type in the native code
DTYPES = {getattr(torch, name): number for number, name in enumerate(names("Dtype"))}
