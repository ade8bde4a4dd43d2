"""Lets tests that make tensors on the CPU run the kernels of a GPU: their tensors are carried there and back."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from seal_fast.backends import _DEVICES, _KERNELS, _OF_LOGITS


def carry(patch, backend: str) -> None:
    """Let `backend`, which serves the GPU alone, take CPU tensors while `patch` (pytest's MonkeyPatch) holds.

    Its kernels of logits, which scale a gradient in place, are not carried: operators refuse them.
    """
    patch.setitem(_DEVICES, backend, "cpu")
    for name in _OF_LOGITS:
        patch.setitem(_KERNELS, name, tuple(each for each in _KERNELS[name] if each != backend))
    for name in ("lif", "bn_lif", "_traced", "_packed"):
        operator = importlib.import_module(f"seal_fast.ops.{name}")
        patch.setattr(operator, "_kernel", _loader(operator._kernel, backend))


def _loader(load, backend: str):
    return lambda name: Carried(load(name)) if name == backend else load(name)


WRITTEN = {"fill_table": (0, 3)}  # function -> places of arguments that it writes to: a table, a norm's statistics


class Carried:
    """A kernel's module whose functions take CPU tensors, and give such."""

    def __init__(self, kernel: ModuleType):
        self._kernel = kernel

    def __getattr__(self, name: str):
        def run(*arguments, **options):
            there, others = moved(arguments, "cuda"), {key: moved(value, "cuda") for key, value in options.items()}
            result = moved(getattr(self._kernel, name)(*there, **others), "cpu")
            for place in WRITTEN.get(name, ()):
                for tensor, written in zip(_tensors(arguments[place]), _tensors(there[place]), strict=True):
                    if not tensor.requires_grad:  # weight and bias are read
                        tensor.copy_(written)
            return result

        return run


def moved(values, device: str):
    """A tensor, or all that are in a tuple, on `device`, with the strides that they have; other things as they are."""
    if isinstance(values, torch.Tensor):
        return _moved(values, device)
    if not isinstance(values, tuple):
        return values
    others = [moved(value, device) for value in values]
    return type(values)(*others) if hasattr(values, "_fields") else tuple(others)


def _tensors(values) -> list[torch.Tensor]:
    every = values if isinstance(values, tuple) else (values,)
    return [value for value in every if isinstance(value, torch.Tensor)]


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    once = tensor
    for axis, stride in enumerate(tensor.stride()):
        once = once.narrow(axis, 0, min(1, once.shape[axis])) if stride == 0 else once
    other = torch.empty_strided(once.shape, once.stride(), dtype=once.dtype, device=device)
    return other.copy_(once).expand(tensor.shape)
