"""Two ways into a kernel with a gradient: the registered operator, and the direct one that is as quick as can be."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn

_PLAIN = {type(None), Tensor, nn.Parameter, nn.Buffer}


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether a call can go the direct way, an autograd.Function.

    torch.compile, torch.export and fake tensors need the operator that is registered with torch.library; each call of
    it costs about 0.1 ms on the host, as much as a small layer's kernel.
    """
    if torch.compiler.is_compiling():
        return False
    return _PLAIN.issuperset(map(type, tensors))


def is_plain(tensor: Tensor | None) -> bool:
    """Whether it is no subclass's, whose elements may be elsewhere."""
    return type(tensor) in _PLAIN


@functools.cache
def kernel_module(operator: str, backend: str) -> ModuleType:
    """The module of an operator's kernels on a backend, which loads what the backend needs."""
    return importlib.import_module(f"..kernels.{operator}.{backend}", __package__)
