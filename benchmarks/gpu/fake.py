"""A fake GPU: every kernel that a program would launch is compiled for it, and results come from the CPU kernels.

    python -m gpu.fake MODULE [ARGUMENT ...]     run a module on it, as `python -m MODULE ARGUMENT ...` would on a GPU
    pytest -p gpu.fake                           run tests on it

Tensors that ask for the device "cuda" lie in the memory of the CPU. The launchers of kernels/ run up to the launch
itself, so that exactly those specialisations are compiled, into the caches of Triton and of kernels/launch/cupy.py,
that a GPU of this compute capability would need. Nothing here tells whether a kernel is right.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import runpy
import sys
import types
from typing import NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode

import without_gpu

CAPABILITY = (9, 0)
ARCHITECTURE = 90
MEMORY = 1 << 30  # bytes that the GPU says are free: little, as it is the CPU's memory that a large test would fill
ROOMS = ("lif", "bn_lif", "seal_loss", "packing")
IN_PLACE = {"scaled", "normalised_gradient"}  # functions of the rooms that may overwrite their first argument


class _Device(TorchFunctionMode):
    """Gives torch's functions the CPU wherever they are asked for a GPU."""

    def __torch_function__(self, function, kinds, arguments=(), options=None):
        if function is torch.Tensor.cuda:
            return arguments[0]
        options = {name: _on_cpu(value) for name, value in (options or {}).items()}
        return function(*map(_on_cpu, arguments), **options)


def _on_cpu(value):
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class _Stream:
    """A stream, an event or a graph: all its work is done when it is asked for."""

    cuda_stream, device_index = 0, 0

    def __init__(self, *_arguments, **_options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        return None

    def elapsed_time(self, _other) -> float:
        return 1.0

    def __getattr__(self, name: str):  # wait_stream, synchronize, record, replay
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_arguments, **_options: None


@functools.cache
def install() -> None:
    """Pretend from here on, in this process. seal_fast may be imported before or after."""
    importlib.import_module("torch._dynamo")  # which makes tables of torch's own classes when it is imported
    _install_torch()
    _install_triton()
    _install_cupy()
    _install_backends()
    _Device().__enter__()


def _install_torch() -> None:
    cuda = torch.cuda
    properties = types.SimpleNamespace(
        name="fake GPU",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        L2_cache_size=50 << 20,
        multi_processor_count=132,
    )
    answers = {
        "is_available": True,
        "is_initialized": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "is_current_stream_capturing": False,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "mem_get_info": (MEMORY, MEMORY),
        **dict.fromkeys(("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode", "empty_cache", "_sleep")),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_arguments, answer=answer, **_options: answer)
    cuda.current_stream = cuda.default_stream = lambda *_arguments: _Stream()
    cuda.Stream = cuda.Event = cuda.CUDAGraph = cuda.stream = cuda.graph = cuda.device = _Stream
    # The mode above sees functions; these are classes.
    generator, autocast = torch.Generator, torch.autocast.__init__
    torch.Generator = lambda device="cpu": generator(_on_cpu(device))
    torch.autocast.__init__ = lambda self, device_type, *rest, **options: autocast(
        self, _on_cpu(device_type), *rest, **options
    )


def _install_triton() -> None:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from gpu import launchers

    driver.set_active(without_gpu.Target(ARCHITECTURE))
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        launchers.prepare(kernel)
        return kernel

    JITFunction.run = compile_only


def _install_cupy() -> None:
    from seal_fast.kernels.launch import cupy as launcher

    compiled = functools.cache(lambda path, expression: launcher.cached(path, expression, f"sm_{ARCHITECTURE}"))
    launcher.shared_memory = lambda _device: without_gpu.SHARED_MEMORY[ARCHITECTURE]
    launcher.start = lambda path, expression, *_launch: compiled(path, expression)


def _install_backends() -> None:
    backends = importlib.import_module("seal_fast.backends")
    for name in ("_resolve", "_resolve_once"):
        setattr(backends, name, _resolved_on_gpu(vars(backends)[name], backends._DEVICES))
    for name in ("triton", "cupy"):
        for room in ROOMS:
            module = importlib.import_module(f"seal_fast.kernels.{room}.{name}")
            results = importlib.import_module(f"seal_fast.kernels.{room}.cpu")
            for function in vars(results).keys() & vars(module).keys():
                if getattr(vars(results)[function], "__module__", "") == results.__name__ and function[0] != "_":
                    setattr(module, function, _replaced(vars(module)[function], vars(results)[function]))


class _OfType(NamedTuple):
    """All that is looked at of a device."""

    type: str


def _resolved_on_gpu(find, devices: dict[str, str]):
    """Chooses a backend as for tensors on a GPU, unless one is asked for that serves the CPU.

    Args:
        find: What chooses.
        devices: Backend -> the type of device that it serves.
    """

    def run(backend, operator, device, dtype, time_steps, default, *settings):
        name = default or "auto" if backend == "auto" else backend
        place = device if devices.get(name) == "cpu" else _OfType("cuda")
        return find(backend, operator, place, dtype, time_steps, default, *settings)

    run.cache_clear = getattr(find, "cache_clear", None)
    return run


def _replaced(kernel, results):
    """Prepares the launch of `kernel`, and returns what `results`, its counterpart on the CPU, computes."""

    def run(*arguments, **options):
        original = arguments[0].clone() if kernel.__name__ in IN_PLACE else None
        kernel(*arguments, **options)
        if original is not None:
            arguments[0].copy_(original)
        options.pop("keep", None)  # in a GPU's shared memory
        return results(*arguments, **options)

    return functools.wraps(kernel)(run)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before tests and their conftest.py ask what can run here."""
    install()


def pytest_collection_modifyitems() -> None:
    """Tests that carry tensors to the GPU and back keep them where they are."""
    with contextlib.suppress(ImportError):
        carry = importlib.import_module("carry")
        plain = carry._moved
        carry._moved = lambda tensor, _device: plain(tensor, "cpu")


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    from gpu import fake  # not this module's copy called __main__

    fake.install()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
