"""Two ways into a kernel with a gradient: the registered operator, and the direct one that is as quick as can be."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

_PLAIN = {type(None), Tensor, nn.Parameter, nn.Buffer}


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether a call can go the direct way, an autograd.Function.

    torch.compile, torch.export and fake tensors need the operator that is registered with torch.library; each call of
    it costs about 0.1 ms on the host, as much as a small layer's kernel.
    """
    if torch.compiler.is_compiling():
        return False
    return _PLAIN.issuperset(map(type, tensors))


class Plans(dict):
    """What was found out about a call, by all that it depends on: repeated calls need no second look.

    It holds no tensor of a call, and begins anew where more and more kinds of calls would fill it.
    """

    MOST = 1024

    def __setitem__(self, key: tuple, plan) -> None:
        """Keep the plan."""
        if len(self) >= self.MOST:
            self.clear()
        super().__setitem__(key, plan)


class _Absent:
    """Stands for a tensor that is not there."""

    dtype = device = shape = None

    @staticmethod
    def stride() -> None:
        pass


_facts, _stride = operator.attrgetter("__class__", "dtype", "device", "shape"), operator.methodcaller("stride")


def key_of(tensors: Iterable[Tensor | None]) -> tuple:
    """All that a plan depends on, of tensors: all but their elements, addresses and graphs."""
    tensors = [_Absent if tensor is None else tensor for tensor in tensors]
    return *map(_facts, tensors), *map(_stride, tensors)


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# What making a call's key may raise where an argument is wrong: the operator's checks then say so in a sentence.
NO_KEY = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def once(operator: str, run: Callable[[], list[Tensor | None]], *inputs: Tensor | None) -> list[Tensor | None]:
    """The gradients that `run` gives; where a graph of them is asked for, it refuses to be differentiated.

    They may depend on more than `inputs`, so that the graph has a leaf of its own: nothing ends in silence.
    """
    if not torch.is_grad_enabled():
        return run()
    with torch.no_grad():
        grads = run()
    others = torch.zeros((), device="cpu", requires_grad=True)
    return [None if grad is None else _Once.apply(operator, grad, others, *inputs) for grad in grads]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operator, grad, *inputs):
        ctx.operator = operator
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError(f"{ctx.operator} can be differentiated twice only with backend='torch'.")


def refuse_batched(operator: str, *grads: Tensor | None) -> None:
    """Raise for gradients of vmap or of is_grads_batched: kernels read addresses, and those have none."""
    for grad in grads:
        if grad is not None and (is_batchedtensor(grad) or is_legacy_batchedtensor(grad)):
            raise NotImplementedError(f"gradients of {operator} are batched only with backend='torch'.")


def is_plain(tensor: Tensor | None) -> bool:
    """Whether it is no subclass's, whose elements may be elsewhere."""
    return type(tensor) in _PLAIN


@functools.cache
def kernel_module(operator: str, backend: str) -> ModuleType:
    """The module of an operator's kernels on a backend, which loads what the backend needs."""
    return importlib.import_module(f"..kernels.{operator}.{backend}", __package__)


def is_exporting() -> bool:
    """Whether torch.export is tracing; an exported program starts each call where this one does.

    The flag behind `torch.compiler.is_exporting` is read, because Dynamo takes the function itself for True in every
    torch.compile of some releases, torch 2.11 among them. torch 2.6 has neither and cannot be asked in strict mode:
    there a reset after the export is needed.
    """
    compiler = torch.compiler
    if hasattr(compiler, "_is_exporting_flag"):
        return compiler._is_exporting_flag
    if hasattr(compiler, "is_exporting"):
        return compiler.is_exporting()
    return compiler.is_compiling() and not compiler.is_dynamo_compiling()


def left_by_vmap(tensor: Tensor) -> bool:
    """Whether the tensor holds the samples of a torch.func.vmap that has ended."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if is_batchedtensor(tensor) and functorch.maybe_get_level(tensor) > (functorch.maybe_current_level() or 0):
            return True
        tensor = functorch.get_unwrapped(tensor)  # what another transform wrapped
    return False
