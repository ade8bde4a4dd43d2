"""Runs the CUDA C++ kernels on the CPU: the text that NVRTC gets, behind cuda_host.h, through the host's compiler.

A test replaces `kernels.launch.cupy.start` by `start`, so that it runs the launchers themselves: their choice of
template, their order of arguments and the arguments' types, which are compared with the kernel's parameters.

    cuda_host.install(monkeypatch, kernels.lif.cupy)    # its kernels now take CPU tensors
    with cuda_host.planning():                          # compiles what these launches need, all at once
        kernels.lif.cupy.forward(...)                   # its outputs are not written
    kernels.lif.cupy.forward(...)                       # runs
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from seal_fast.kernels.launch import cupy
from seal_fast.ops._dispatch import Plans

HEADER = Path(__file__).with_suffix(".h")
COMPILER = os.environ.get("CXX") or shutil.which("g++")
# As NVRTC compiles: one rounding per operation. Blocks of memory are read as words of another type. Most of the time
# goes into compiling, so nothing is optimised.
FLAGS = ("-std=c++17", "-O0", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")
FLAGS += ("-fvisibility=hidden", "-w")  # libraries of different texts do not meet
CHECKS = ("-fsanitize=alignment,null,bounds",)  # their handlers are in cuda_host.h, so nothing is linked
BATCH = 48  # kernels compiled as one file
BACKWARDS = False  # whether the blocks run from the last to the first
SHARED_MEMORY = 227 << 10  # bytes that a block may have, as on an H200
DTYPES = {torch.bfloat16: "bfloat16"}  # others have the names of NumPy


def missing() -> str:
    """Why nothing can run here, or an empty string."""
    if os.name != "posix" or not COMPILER:
        return "kernels run on the CPU through g++ on Linux, which is not here"
    return ""


class Kernels:
    """Kernels of one text, by the C++ expressions that name them."""

    def __init__(self, text: str):
        self.text = text
        self._compiled: dict[str, tuple[ctypes.CDLL, int]] = {}

    def compile(self, expressions: Iterable[str]) -> None:
        """Compile those that are not yet."""
        wanted = sorted(set(expressions) - set(self._compiled))
        size = max(16, min(BATCH, -(-len(wanted) // 2)))  # the header costs as much as ten kernels
        batches = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        with ThreadPoolExecutor(2) as pool:
            for batch, library in zip(batches, pool.map(self._library, batches), strict=True):
                self._compiled.update({expression: (library, index) for index, expression in enumerate(batch)})

    def parameters(self, expression: str) -> list[str]:
        """The types of a kernel's parameters: "const float32*", "int64" and so on."""
        self.compile([expression])
        library, index = self._compiled[expression]
        return library.cuda_host_signature(index).decode().split(",")[:-1]

    def launch(
        self,
        expression: str,
        blocks: int | tuple[int, ...],
        threads: int | tuple[int, ...],
        arguments: Iterable[np.generic],  # addresses as uint64
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel to its end.

        Raises:
            TypeError: The arguments are not what the kernel takes.
            RuntimeError: The kernel did what it must not.
        """
        arguments = list(arguments)
        parameters = self.parameters(expression)
        expected = ["uint64" if parameter.endswith("*") else parameter for parameter in parameters]
        got = [argument.dtype.name for argument in arguments]
        if got != expected:
            raise TypeError(f"{expression} takes {', '.join(parameters)}; got {', '.join(got)}")
        sizes = [*_three(blocks), *_three(threads)]
        values = [np.array(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        library, index = self._compiled[expression]
        error = library.cuda_host_launch(index, (ctypes.c_uint * 6)(*sizes), BACKWARDS, shared_bytes, pointers)
        if error:
            raise RuntimeError(f"{expression}: {error.decode()}")

    def _library(self, expressions: list[str]) -> ctypes.CDLL:
        types = [f"cuda_host::Kernel<{name}>" for name in expressions]
        kernels = "".join(f"    {{{name}::call, {name}::signature}},\n" for name in types)
        program = f"""{HEADER.read_text(encoding="utf-8")}
#line 1 "kernel.cu"
{_with_shared_memory(self.text)}
namespace cuda_host {{
struct Entry {{
  void (*call)(const void* const*);
  const char* (*signature)();
}};
}}
static const cuda_host::Entry cuda_host_entries[] = {{  // where names are as in the kernels' text
{kernels}}};
#pragma GCC visibility push(default)
extern "C" const char* cuda_host_signature(int kernel) {{ return cuda_host_entries[kernel].signature(); }}
extern "C" const char* cuda_host_launch(
    int kernel, const unsigned* sizes, bool backwards, size_t shared, const void* const* given) {{
  return cuda_host::launch(cuda_host_entries[kernel].call, sizes, backwards, shared, given);
}}
"""
        library = ctypes.CDLL(str(_build(program)))
        library.cuda_host_signature.restype = library.cuda_host_launch.restype = ctypes.c_char_p
        library.cuda_host_launch.argtypes = (
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_bool, ctypes.c_size_t, ctypes.c_void_p),
        )
        return library


@functools.cache
def kernels(path: Path) -> Kernels:
    """The kernels of a .cu file."""
    return Kernels(cupy.source(path))


def start(
    path: Path, expression: str, blocks: int, threads: int, values: list, codes: str, _device, shared_bytes=0
) -> None:
    """What stands in for `kernels.launch.cupy.start`."""
    if _planned is not None:
        _planned.append((path, expression))
        return
    arguments = [getattr(np, cupy.CODES[code])(value) for code, value in zip(codes, values, strict=True)]
    kernels(path).launch(expression, blocks, threads, arguments, shared_bytes)


_planned: list[tuple[Path, str]] | None = None


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """Launches within are not run; at the end, all of their kernels are compiled together."""
    global _planned
    before, _planned = _planned, []
    try:
        yield
        for path in {path for path, _ in _planned}:
            kernels(path).compile(expression for other, expression in _planned if other == path)
    finally:
        _planned = before


def install(monkeypatch, room) -> None:
    """Let the launcher module `room`, such as kernels.lif.cupy, run its kernels on the CPU until the test's end."""
    counting = []

    def counters(device, number):
        counting.append(np.zeros(number + 64, np.int32))  # by no operation of torch: those of a layer are counted
        return torch.from_numpy(counting[-1])[:number]

    class Launch(cupy.Launch):
        def __call__(self, *tensors):
            path, expression, *_ = self.where
            if _planned is None:
                parameters = kernels(path).parameters(expression)
                _check_tensors(parameters, expression, (*tensors, *self.numbers), self.device)
            super().__call__(*tensors)
            assert not any(each.any() for each in counting), f"{expression} does not set its counters back"
            counting.clear()

    for operator in ("lif", "bn_lif", "seal_loss"):  # plans keep launches, and these are of this call alone
        monkeypatch.setattr(sys.modules[f"seal_fast.ops.{operator}"], "_plans", Plans())
    monkeypatch.setattr(room, "Launch", Launch)
    monkeypatch.setattr(cupy, "start", start)
    stand_ins = {"shared_memory": lambda device: SHARED_MEMORY, "counters": counters}
    for name, stand_in in stand_ins.items():
        if hasattr(room, name):
            monkeypatch.setattr(room, name, stand_in)


def _check_tensors(parameters: list[str], expression: str, arguments: Iterable, device: torch.device) -> None:
    """Tensors stand where the kernel takes addresses of their dtype, and nothing else does."""
    for place, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
        if isinstance(argument, torch.Tensor):
            got = f"{DTYPES.get(argument.dtype) or str(argument.dtype).removeprefix('torch.')}*"
            if parameter.removeprefix("const ") != got or argument.device != device:
                raise TypeError(f"argument {place} of {expression} is {parameter}; got {got} on {argument.device}")
        elif (argument is None) != parameter.endswith("*"):
            raise TypeError(f"argument {place} of {expression} is {parameter}; got {argument!r}")


def _three(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return (*sizes, 1, 1)[:3]


def _with_shared_memory(text: str) -> str:
    """Each `__shared__ type name[size];` as a reference to the block's memory, or to the launch's without a size."""

    def reference(match: re.Match) -> str:
        kind, name, sizes = match.groups()
        if sizes == "[]":
            return f"{kind}* const {name} = static_cast<{kind}*>(cuda_host::shared(nullptr, 0));"
        memory = (
            f"static_cast<std::add_pointer_t<{kind}{sizes}>>(cuda_host::shared(&{name}_key, sizeof({kind}{sizes})))"
        )
        return f"static char {name}_key; auto& {name} = *{memory};"

    return re.sub(
        r"(?:extern )?__shared__ (?:__align__\(\d+\) )?(.+?) (\w+)((?:\[[^\]\n]*\])*);",
        reference,
        text,
    )


def _build(program: str) -> Path:
    """Compile a program to a shared library, once for each text."""
    folder = Path(tempfile.gettempdir()) / f"cuda_host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256("\0".join((program, COMPILER, *FLAGS, *CHECKS)).encode()).hexdigest()
    library = folder / f"{name}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source = Path(work) / "kernel.cpp"
        source.write_text(program, encoding="utf-8")
        _run(COMPILER, *FLAGS, *CHECKS, "-c", str(source), "-o", f"{work}/kernel.o")
        _run(COMPILER, "-shared", f"{work}/kernel.o", "-o", f"{work}/kernel.so")
        os.replace(f"{work}/kernel.so", library)
    return library


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stderr[:4000]}")
