"""Lets tests that make tensors on the CPU run the kernels of a GPU: their tensors are carried there and back."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch

from seal_fast.backends import _DEVICES
from seal_fast.ops import lif as operator


def carry(patch, backend: str) -> None:
    """Let `backend`, which serves the GPU alone, take CPU tensors while `patch` (pytest's MonkeyPatch) holds."""
    patch.setitem(_DEVICES, backend, "cpu")
    load = operator._kernel
    patch.setattr(operator, "_kernel", lambda name: carried(load(name)) if name == backend else load(name))


def carried(kernel: ModuleType) -> SimpleNamespace:
    """A kernel's module whose functions take CPU tensors, and give such."""

    def function(name):
        def run(*arguments, **options):
            return moved(getattr(kernel, name)(*moved(arguments, "cuda"), **options), "cpu")

        return run

    return SimpleNamespace(forward=function("forward"), backward=function("backward"))


def moved(values: tuple, device: str) -> tuple:
    """The tensors among `values` on `device`, with the strides that they have."""
    return tuple(_moved(value, device) if isinstance(value, torch.Tensor) else value for value in values)


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    once = tensor
    for axis, stride in enumerate(tensor.stride()):
        once = once.narrow(axis, 0, min(1, once.shape[axis])) if stride == 0 else once
    other = torch.empty_strided(once.shape, once.stride(), dtype=once.dtype, device=device)
    return other.copy_(once).expand(tensor.shape)
