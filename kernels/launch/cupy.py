"""CUDA C++ kernels: compiled by NVRTC for one GPU, kept on disk, and started by CuPy on torch's stream.

CuPy's RawModule is not used, because it compiles with -ftz=true, which makes small potentials zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from .device import current_stream, is_current
from .enumerations import known, parse

# No fused multiply-adds and, as is NVRTC's default, IEEE division: spikes equal the reference bit for bit.
OPTIONS = ("--std=c++17", "--fmad=false")
_FORMAT = "2"  # of a file in the cache; cubins of the first lack their last byte
_SHARED = 48 << 10  # bytes of shared memory that a block may have without asking
_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, which CuPy has no name for
ACCESS = 16  # bytes that one thread reads or writes at once: the widest access there is
NUMBERS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "double"}

# What a kernel takes, as in `struct` and as NumPy has it: an address, an int64_t, a float or a double.
CODES = {"Q": "uint64", "q": "int64", "f": "float32", "d": "float64"}


def missing() -> str:
    """Why CuPy cannot be used, or an empty string."""
    if torch.version.hip is not None:
        return "it needs CUDA, and this torch was built for ROCm"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed; install cupy-cuda12x or cupy-cuda13x"
    return ""


@functools.cache
def source(path: Path) -> str:
    """The text of a .cu file, with each file that it includes put in its place once."""
    seen = set()

    def inlined(file: Path) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = file.read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'#include "(.+)"\n', lambda match: inlined((file.parent / match[1]).resolve()), text)

    return inlined(path.resolve())


def architecture(device: torch.device) -> str:
    """What NVRTC compiles for: the device itself, or the newest one that NVRTC knows, for the driver to translate."""
    from cupy.cuda import nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    wanted = 10 * major + minor
    known = [number for number in nvrtc.getSupportedArchs() if number <= wanted]
    if not known:
        raise RuntimeError(f"NVRTC {nvrtc.getVersion()} does not compile for compute capability {major}.{minor}.")
    return f"sm_{wanted}" if wanted in known else f"compute_{max(known)}"


def build(text: str, expression: str, arch: str) -> tuple[str, bytes]:
    """Compile the kernel that the C++ expression names, a template's specialisation: its symbol, and a cubin or PTX."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(text, "kernel.cu", (), ())
    try:
        nvrtc.addNameExpression(program, expression)
        nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture={arch}"))
        code = _whole(nvrtc.getCUBIN(program)) if arch.startswith("sm_") else nvrtc.getPTX(program)
        return nvrtc.getLoweredName(program, expression), code.encode() if isinstance(code, str) else code
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC cannot compile {expression}:\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def _whole(cubin: bytes) -> bytes:
    """The cubin with its last byte, which CuPy cuts off, as of 14.2, as if it ended a string.

    A cubin ends with one of its two tables of headers, and that with the highest byte of a 64-bit number: zero.
    """
    starts = struct.unpack_from("<QQ", cubin, 0x20)  # of program headers and of section headers
    size, count, section_size, sections = struct.unpack_from("<4H", cubin, 0x36)
    return cubin.ljust(max(starts[0] + size * count, starts[1] + section_size * sections), b"\0")


def cached(path: Path, expression: str, arch: str) -> tuple[str, bytes]:
    """What `build` returns, from the disk if it is there. A file holds its own checksum, the symbol and the code."""
    from cupy.cuda import nvrtc

    text = source(path)
    key = "\0".join((_FORMAT, text, expression, arch, *OPTIONS, str(nvrtc.getVersion())))
    file = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.kernel"
    with contextlib.suppress(OSError):
        content = file.read_bytes()
        if content[:32] == hashlib.sha256(content[32:]).digest():
            symbol, code = content[32:].split(b"\0", 1)
            return symbol.decode(), code
    symbol, code = build(text, expression, arch)
    content = symbol.encode() + b"\0" + code
    with contextlib.suppress(OSError):  # a folder that cannot be written to
        _replace(file, hashlib.sha256(content).digest() + content)
    return symbol, code


def _folder() -> Path:
    """Where compiled kernels are kept: with CuPy's own if the user has chosen a place for these."""
    if os.environ.get("CUPY_CACHE_DIR"):
        return Path(os.environ["CUPY_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "seal_fast"


def _replace(file: Path, content: bytes) -> None:
    """Write all of the file or nothing, whoever else writes or reads it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent)
    try:
        with open(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def specialised(kernel: str, *template: str | int | bool) -> str:
    """The C++ expression that names a kernel's specialisation; a str is C++ as it stands."""
    words = (str(argument).lower() if isinstance(argument, bool) else str(argument) for argument in template)
    return f"{kernel}<{', '.join(words)}>"


@functools.cache
def enumerator(path: Path, enumeration: str, name: str) -> str:
    """What C++ calls `name` of the enumeration in the text of `path`.

    Raises:
        ValueError: The enumeration does not have it.
    """
    text = re.sub("//.*", "", source(path))
    (names,) = re.findall(rf"SEAL_ENUM\({enumeration},([^)]*)\)", text)
    return known(name, enumeration, parse(names), "cupy").upper()


def reach(tensors: Iterable[torch.Tensor | None]) -> int:
    """How many neighbours an access may move, by where tensors begin: a power of two, ACCESS where all are aligned."""
    within = ACCESS
    for tensor in tensors:
        if tensor is not None:
            address = tensor.data_ptr()
            if address % ACCESS:
                within = min(within, max((address & -address) // tensor.element_size(), 1))
    return within


class Launch:
    """Launches of a kernel that differ in their tensors alone, so that all else is found out once.

    Args:
        path: Of the .cu file.
        expression: Names the kernel in C++: a template's specialisation.
        blocks: Of the grid.
        threads: Of a block.
        numbers: What the kernel takes after its tensors, an int as int64_t.
        real: What it takes a float as.
        device: Where it runs.
        shared_bytes: Of the block's `extern __shared__` memory.
    """

    def __init__(
        self,
        path: Path,
        expression: str,
        blocks: int,
        threads: int,
        numbers: Sequence[int | float] = (),
        *,
        real: torch.dtype,
        device: torch.device,
        shared_bytes: int = 0,
    ):
        self.where = path, expression, blocks, threads
        self.numbers, self.device, self.shared_bytes = numbers, device, shared_bytes
        kinds = {int: "q", bool: "q", float: "d" if real == torch.float64 else "f"}
        self.codes = "".join(kinds[type(number)] for number in numbers)

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Start the kernel. It takes a tensor as a pointer, None as a null pointer."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        codes = "Q" * len(addresses) + self.codes
        start(*self.where, [*addresses, *self.numbers], codes, self.device, self.shared_bytes)


def start(
    path: Path,
    expression: str,
    blocks: int,
    threads: int,
    arguments: Sequence[int | float],  # addresses and numbers
    codes: str,  # what each of them is, of CODES
    device: torch.device,
    shared_bytes: int = 0,
) -> None:
    """Start a kernel on torch's current stream of `device`, by CuPy where this thread does so for the first time."""
    key = (path, expression, device, codes)
    prepared = _of_thread.prepared.get(key)
    if prepared is not None and shared_bytes <= prepared.shared_bytes and is_current(device):
        prepared.start(blocks, threads, arguments, current_stream(device), shared_bytes)
        return
    import cupy
    import numpy as np

    passed = [getattr(np, CODES[code])(argument) for code, argument in zip(codes, arguments, strict=True)]
    options = {"shared_mem": shared_bytes} if shared_bytes else {}
    with cupy.cuda.Device(device.index):
        function = _function(path, expression, device)
        granted = _grant(function, shared_bytes)
        function((blocks,), (threads,), passed, stream=_Stream(current_stream(device)), **options)
    if torch.cuda.is_initialized() and hasattr(cupy.cuda.driver, "launchKernel"):
        _of_thread.prepared[key] = Prepared(function, codes, granted, cupy.cuda.driver.launchKernel)


def _grant(function, shared_bytes: int) -> int:
    """Let blocks of the function have so much dynamic shared memory, and return how much they may have.

    That is never lowered, as threads and signatures that have been granted more share the function.
    """
    import cupy

    with _granting:
        if shared_bytes > _granted.get(function.ptr, _SHARED):
            cupy.cuda.driver.funcSetAttribute(function.ptr, _MOST_SHARED, shared_bytes)
            _granted[function.ptr] = shared_bytes
        return _granted.get(function.ptr, _SHARED)


_granting = threading.Lock()
_granted: dict[int, int] = {}  # a function's address -> bytes of shared memory, where it is more than any may have


class Prepared:
    """A kernel that this thread has started, and room for its arguments, so that the driver is called at once.

    CuPy's own call wraps each argument in an object and asks each time whether the thread has a context.
    """

    def __init__(self, function, codes: str, shared_bytes: int, launch_kernel: Callable[..., None]):
        """Lay the room out.

        Args:
            function: CuPy's function.
            codes: What each argument is, as for `start`.
            shared_bytes: Of dynamic shared memory that a block of the function may have.
            launch_kernel: CuPy's binding of cuLaunchKernel.
        """
        self.function = function  # keeps its module loaded
        self.address = function.ptr
        self.shared_bytes = shared_bytes
        self.launch_kernel = launch_kernel
        self.pack_into = struct.Struct(codes).pack_into
        self.room = ctypes.create_string_buffer(max(struct.calcsize(codes), 1))
        ends = (struct.calcsize(codes[: place + 1]) for place in range(len(codes)))
        places = [end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)]
        self.pointers = (ctypes.c_void_p * len(codes))(*(ctypes.addressof(self.room) + place for place in places))
        self.parameters = ctypes.addressof(self.pointers)

    def start(self, blocks: int, threads: int, arguments: Sequence[int | float], stream: int, shared_bytes: int):
        """Start the function, whose arguments the driver copies before it returns."""
        self.pack_into(self.room, 0, *arguments)
        self.launch_kernel(self.address, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, self.parameters, 0)


class _OfThread(threading.local):
    """What each thread has for itself: a context is a thread's own, and so is room that arguments are written to."""

    def __init__(self):
        self.prepared: dict[tuple, Prepared] = {}


_of_thread = _OfThread()


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on this GPU."""
    from cupy.cuda import runtime

    return runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index)


@functools.cache
def _function(path: Path, expression: str, device: torch.device):
    import cupy

    symbol, code = cached(path, expression, architecture(device))
    module = cupy.cuda.Module()
    module.load(code)
    return module.get_function(symbol)


class _Stream:
    """All that CuPy looks at. Its own Stream.from_external destroys torch's stream in the end, as of CuPy 14.2."""

    def __init__(self, pointer: int):
        self.ptr = pointer
