"""Counts what a call starts: this library's kernels, and torch's operations."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from seal_fast.kernels.launch import cpu

# They allocate, or give another view of what is there: nothing is started on a device.
IDLE = ("empty", "new_empty", "detach", "alias", "lift_fresh")


class Counts(NamedTuple):
    """Names of kernels, native functions on the CPU, and of torch's operations that compute, in order."""

    kernels: list[str]
    operations: list[str]

    def __str__(self) -> str:
        return f"kernels {len(self.kernels)}, torch operations {len(self.operations)}"


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(IDLE):
            self.names.append(name)
        return function(*arguments, **(options or {}))


def counted(run: Callable[[], object]) -> Counts:
    """What `run` starts, in this thread."""
    kernels: list[str] = []

    def noted(start, name_of):
        def note(first, *others, **options):
            kernels.append(name_of(first, *others))
            return start(first, *others, **options)

        return note

    with contextlib.ExitStack() as stack:
        note = noted(cpu.function, lambda name: name)
        stack.enter_context(mock.patch.object(cpu, "function", note))
        for name, module in [*sys.modules.items()]:
            if name == "seal_fast.kernels.launch.triton":  # whose launches start a kernel by `start` but once
                note = noted(module.Launch.__call__, _name_of_triton)
                stack.enter_context(mock.patch.object(module.Launch, "__call__", note))
            elif name == "seal_fast.kernels.launch.cupy":
                stack.enter_context(mock.patch.object(module, "start", noted(module.start, _name_of_cupy)))
        operations = stack.enter_context(_Operations())
        run()
    return Counts(kernels, operations.names)


def _name_of_cupy(_path, expression: str, *_others) -> str:
    return expression.partition("<")[0]


def _name_of_triton(launch, *_tensors) -> str:
    return launch.kernel.fn.__name__
