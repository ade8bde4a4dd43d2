"""Kernels compiled without a GPU, in the way of their launchers: all goes as on a GPU, but for the start."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a block may have


class Kernel(NamedTuple):
    """A compiled kernel and its launch."""

    name: str  # of the function, a C++ template's without its arguments
    cubin: bytes
    threads: int  # of a block
    dynamic_shared: int  # bytes that the launch adds to what the kernel declares


class Target:
    """What Triton asks its driver for before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):  # noqa: D102
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):  # noqa: D102
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device):  # noqa: D102
        return 0


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list]:
    """Triton's launches compile for this compute capability, 90 for sm_90, and start nothing.

    Yields the list of their kernels. Arguments take the way that they take to a GPU, tensors of the CPU included.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    kernels, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver.set_active(Target(capability))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run
        if torch.cuda.is_available():  # else there is no driver to return to
            driver.reset_active()


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Backends triton and cupy take CPU tensors, and do what this library does of a repeated launch.

    Left out are Triton's own launcher, the driver, and what is asked about streams, captures and counters. What kernels
    would write is left as it is.
    """
    from seal_fast.kernels.launch import cupy, triton
    from seal_fast.ops._dispatch import Plans

    zeros, prepared = torch.zeros(1 << 16, dtype=torch.int32), {}

    def nothing(*_arguments, **_options):
        pass

    def counters(_device, _number):  # no Mock: it would be timed
        return zeros

    def found(kernel, _blocks, *arguments, device, num_warps, **constants):
        return nothing, triton.last_arguments(kernel, arguments, constants)

    def start(path, expression, blocks, threads, arguments, codes, device, shared_bytes=0):
        key = path, expression, device, codes
        if key not in prepared:
            prepared[key] = cupy.Prepared(types.SimpleNamespace(ptr=0), codes, shared_bytes, nothing)
        prepared[key].start(blocks, threads, arguments, 0, shared_bytes)

    operators = [importlib.import_module(f"seal_fast.ops.{name}") for name in ("lif", "bn_lif", "seal_loss")]
    with contextlib.ExitStack() as stack:
        for operator in operators:
            stack.enter_context(mock.patch.object(operator, "_plans", Plans()))  # whose launches start nothing
            stack.enter_context(mock.patch.object(operator, "resolve", lambda backend, *_: backend))
        rooms = [f"{operator}.{backend}" for operator in ("bn_lif", "seal_loss") for backend in ("triton", "cupy")]
        for name in (*rooms, "bn_lif.triton_statistics"):
            room = importlib.import_module(f"seal_fast.kernels.{name}")
            stack.enter_context(mock.patch.object(room, "counters", counters))
        stand_ins = {"start": found, "is_current": lambda _device: True, "current_stream": lambda _device: 0}
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(triton, name, stand_in))
        stack.enter_context(mock.patch.object(cupy, "start", start))
        yield


def triton_kernels(capability: int, call: Callable[[], object]) -> list[Kernel]:
    """What `call` starts by Triton."""
    with compiling(capability) as kernels:
        call()
    return [
        # All shared memory is the launch's: the cubin declares it as external.
        Kernel(each.metadata.name, each.asm["cubin"], 32 * each.metadata.num_warps, each.metadata.shared)
        for each in kernels
    ]


def cuda_kernels(capability: int, call: Callable[[], object]) -> list[Kernel]:
    """What `call` starts by CuPy."""
    from seal_fast.kernels.launch import cupy as launcher  # not needed to start make gpu, which finds no library yet

    launches = []

    def start(path, expression, blocks, threads, arguments, codes, device, shared_bytes=0):
        launches.append((path, expression, threads, shared_bytes))

    with mock.patch.object(launcher, "start", start):
        call()
    return [
        Kernel(
            expression.split("<")[0],
            launcher.build(launcher.source(path), expression, f"sm_{capability}")[1],
            threads,
            shared_bytes,
        )
        for path, expression, threads, shared_bytes in launches
    ]


def known(backend: str) -> list[int]:
    """Those of the compute capabilities 8.0, 9.0 and 10.0 that the installed compiler of `backend` compiles for."""
    if backend == "triton":
        import triton

        return [80, 90] if triton.__version__.startswith("3.2.") else [80, 90, 100]
    if importlib.util.find_spec("cupy") is None:
        return []
    from cupy.cuda import nvrtc

    return [capability for capability in (80, 90, 100) if capability in nvrtc.getSupportedArchs()]
