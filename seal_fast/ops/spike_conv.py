"""Convolutions and linear layers of spikes, which skip what did not fire."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from ..backends import resolve, skips_zeros
from ..kernels.packing.reference import pack
from ..kernels.spike_conv import rule as measured
from ._arguments import require_device, require_float_tensor, shape
from ._dispatch import is_plain, kernel_module
from ._spike_tensor import SpikeTensor, is_plain_memory, plain, rule

_ATEN = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16)

# Spikes of a layer below which the host's time decides: of fewer, neurons give numbers. Where no kernel served them, as
# in depthwise convolutions, networks of layers of 65,536 spikes took up to twice as long with bits.
LEAST = 1 << 18

# Calls of each kind since the process began, by what ran them: "cpu" skips zeros, "torch" is dense.
calls: Counter[tuple[str, str]] = Counter()


class _Here(threading.local):
    dense = False  # whether convolutions of this thread are to be dense


_here = _Here()


@contextlib.contextmanager
def dense_convolutions() -> Iterator[None]:
    """Within this context, neurons of this thread give dense spikes, and convolutions of spikes are torch's."""
    before, _here.dense = _here.dense, True
    try:
        yield
    finally:
        _here.dense = before


def spike_conv2d(
    spikes: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """torch.nn.functional.conv2d of spikes, by a kernel that adds the weights of those that fired.

    The gradient of the weights skips what did not fire as well; that of the spikes is dense and torch's.

    Args:
        spikes: Zeros and ones [P, C, H, W]; what neurons give on the CPU holds them as bits already.
        weight: [O, C, KH, KW], of the dtype of the spikes.
        bias: [O].
        stride: As the next two, a number or a pair of them.
        padding: Zeros at each side.
        dilation: Distance between the pixels that meet a kernel's neighbouring elements.
        backend: "cpu" skips zeros at any firing rate, "torch" is dense, and "auto" takes the faster one by the firing
            rate of this call.

    Returns:
        [P, O, OH, OW], which differ from those of a dense convolution by the order of the sums. A weight of inf or NaN
        shows where a spike meets it, and not where a zero does.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape or device, the spikes are not zeros and ones, or the backend cannot
            run.
    """
    require_float_tensor("spikes", spikes, "[P, C, H, W]")
    require_float_tensor("weight", weight, "[O, C, KH, KW]")
    if spikes.dim() != 4 or weight.dim() != 4 or spikes.shape[1] != weight.shape[1]:
        raise ValueError(
            f"spikes must be [P, C, H, W] and weight [O, C, KH, KW]; got {shape(spikes)}, {shape(weight)}."
        )
    spikes = _prepared(spikes, weight, bias, backend, "spike_conv2d")
    return F.conv2d(spikes, weight, bias, _pair(stride), _pair(padding), _pair(dilation))


def spike_linear(spikes: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """torch.nn.functional.linear of spikes, by a kernel that adds the weights of those that fired.

    Args:
        spikes: Zeros and ones [..., C].
        weight: [O, C].
        bias: [O].
        backend: As in `spike_conv2d`.

    Returns:
        [..., O].

    Raises:
        TypeError, ValueError: As `spike_conv2d`.
    """
    require_float_tensor("spikes", spikes, "[..., C]")
    require_float_tensor("weight", weight, "[O, C]")
    if spikes.dim() < 1 or weight.dim() != 2 or spikes.shape[-1] != weight.shape[1]:
        raise ValueError(f"spikes must be [..., C] and weight [O, C]; got {shape(spikes)}, {shape(weight)}.")
    return F.linear(_prepared(spikes, weight, bias, backend, "spike_linear"), weight, bias)


def _prepared(spikes: Tensor, weight: Tensor, bias: Tensor | None, backend: str, operator: str) -> Tensor:
    """The spikes as the chosen backend takes them."""
    require_device("weight", weight, "spikes", spikes)
    if weight.dtype != spikes.dtype and not torch.is_autocast_enabled(spikes.device.type):
        raise TypeError(f"weight must be of the spikes' dtype, {spikes.dtype}; got {weight.dtype}.")
    if backend == "auto":  # SEAL_FAST_BACKEND may name a kernel of neurons that has none for this
        chosen = "cpu" if skips_zeros(spikes.device, spikes.dtype) else "torch"
    else:
        chosen = resolve(backend, operator, spikes.device, spikes.dtype)
    if chosen == "torch" or torch.compiler.is_compiling():
        return plain(spikes)
    as_bits = isinstance(spikes, SpikeTensor) and spikes.packed is not None
    if not as_bits or (spikes.dim() == 4 and _layout(spikes) is None):
        if backend == "auto":
            return spikes
        spikes = _Pack.apply(spikes)
    view = spikes.view_as(spikes)
    view.always = backend == "cpu"
    return view


class _Pack(torch.autograd.Function):
    """Numbers as bits, with the gradient of nothing having been done."""

    @staticmethod
    def forward(ctx, spikes: Tensor) -> SpikeTensor:
        spikes = plain(spikes).contiguous()
        if not bool(((spikes == 0) | (spikes == 1)).all()):
            raise ValueError("spikes must be zeros and ones for backend 'cpu'; got other numbers.")
        return SpikeTensor.of(pack(spikes.view(1, -1)), spikes.shape, spikes.stride(), spikes.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def fires_bits(like: Tensor, elements: int, rows: int) -> bool:
    """Whether a neuron for the CPU gives bits alone.

    Args:
        like: Of the spikes' dtype and device.
        elements: Of the spikes.
        rows: In which the neuron packs them.
    """
    return (
        elements >= LEAST
        and rows > 0
        and elements % (8 * rows) == 0
        and like.dtype in _DTYPES
        and is_plain(like)
        and not _here.dense
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and skips_zeros(like.device, like.dtype)
    )


class _Geometry(NamedTuple):
    """What there is of a convolution besides its tensors, once for each axis."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, *lists: list[int]) -> _Geometry | None:
        """From lists of one or two numbers; None where torch would refuse them."""
        if not all(len(each) in (1, 2) for each in lists):
            return None
        found = cls(*(tuple(each) * (2 // len(each)) for each in lists))
        wrong = min(*found.stride, *found.dilation) < 1 or min(found.padding) < 0
        return None if wrong else found


def _output_size(spikes, weight: Tensor, geometry: _Geometry | None, *others: Tensor | None) -> tuple[int, int] | None:
    """Height and width of what kernels make of spikes [P, C, H, W]; None where they cannot, or torch would raise."""
    if geometry is None or not _fits(spikes, weight, *others) or spikes.dim() != 4 or weight.dim() != 4:
        return None
    if spikes.shape[1] != weight.shape[1] or 0 in weight.shape or _layout(spikes) is None:
        return None
    size = _kernel().output_size(tuple(spikes.shape[2:]), tuple(weight.shape[2:]), *geometry)
    return size if min(size) > 0 else None


@rule(_ATEN.convolution.default)
def _convolution(func, spikes, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    geometry = _Geometry.of(stride, padding, dilation)
    size = None if transposed or groups != 1 else _output_size(spikes, weight, geometry, bias)
    if size is None or not _is_bias(bias, len(weight)):
        return NotImplemented
    if not _pays("spike_conv2d", spikes, len(spikes) * size[0] * size[1], weight, geometry):
        return NotImplemented
    lying = _layout(spikes)
    words = _kernel().words(spikes.packed, tuple(spikes.shape), channels_last=lying)
    # As torch's convolution, whose output is channels_last where its input or its weights are.
    last = lying or (weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous())
    return _kernel().forward(words, tuple(spikes.shape), weight, bias, *geometry, channels_last=last)


@rule(_ATEN.convolution_backward.default)
def _convolution_backward(func, grad, spikes, weight, sizes, stride, padding, dilation, *rest):
    *how, (of_spikes, of_weight, of_bias) = rest
    transposed, _, groups = how
    if not isinstance(spikes, SpikeTensor) or not is_plain_memory(spikes):
        return NotImplemented
    grads = [None, None, None]
    if of_weight:
        geometry = _Geometry.of(stride, padding, dilation)
        size = None if transposed or groups != 1 else _output_size(spikes, weight, geometry, grad)
        if size is None or not _pays("weight gradient", spikes, len(spikes) * size[0] * size[1], weight, geometry):
            return NotImplemented
        words = _kernel().words(spikes.packed, tuple(spikes.shape), channels_last=_layout(spikes))
        into = torch.empty_like(weight)
        grads[1] = _kernel().weight_gradient(words, tuple(spikes.shape), grad, into, *geometry)
    if of_spikes:  # which reads no element of the spikes
        like = torch.empty_strided(spikes.shape, spikes.stride(), dtype=spikes.dtype, device=spikes.device)
        grads[0] = func(grad, like, weight, sizes, stride, padding, dilation, *how, (True, False, False))[0]
    if of_bias:  # not by `func`, which would compute the weight's gradient for it
        grads[2] = grad.sum([axis for axis in range(grad.dim()) if axis != 1])
    return tuple(grads)


_LINEAR = _Geometry((1, 1), (0, 0), (1, 1))  # a linear layer is a convolution of single pixels


@rule(_ATEN.mm.default)
def _product(func, left, right, bias=None):
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0] or 0 in right.shape:
        return NotImplemented
    if isinstance(left, SpikeTensor):
        if left.stride() == (left.shape[1], 1) and _fits(left, right, bias) and _is_bias(bias, right.shape[1]):
            return _linear(left, right, bias)
        if bias is None and left.stride() == (1, left.shape[0]) and _fits(left, right):
            grad = _linear_weight_gradient(left.t(), right)
            return grad if grad is NotImplemented else grad.t()
    elif bias is None and right.stride() == (right.shape[1], 1) and _fits(right, left):
        return _linear_weight_gradient(right, left.t())
    return NotImplemented


@rule(_ATEN.addmm.default)
def _sum_with_product(func, bias, left, right, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1 or not isinstance(left, SpikeTensor):
        return NotImplemented
    return _product(func, left, right, bias)


def _linear(spikes: SpikeTensor, weight: Tensor, bias: Tensor | None):
    """[P, C], [C, O], [O] -> [P, O]."""
    weight = weight.t().unsqueeze(-1).unsqueeze(-1)
    if not _pays("spike_linear", spikes, len(spikes), weight, _LINEAR):
        return NotImplemented
    size = (*spikes.shape, 1, 1)
    words = _kernel().words(spikes.packed, size, channels_last=True)
    return _kernel().forward(words, size, weight, bias, *_LINEAR).flatten(1)


def _linear_weight_gradient(spikes: SpikeTensor, grad: Tensor):
    """[P, C], [P, O] -> [O, C]."""
    into = grad.new_empty(grad.shape[1], spikes.shape[1], 1, 1)
    if not _pays("weight gradient", spikes, len(spikes), into, _LINEAR):
        return NotImplemented
    size = (*spikes.shape, 1, 1)
    words = _kernel().words(spikes.packed, size, channels_last=True)
    grad = grad.unsqueeze(-1).unsqueeze(-1)
    return _kernel().weight_gradient(words, size, grad, into, *_LINEAR).flatten(1)


def _is_bias(bias: Tensor | None, outputs: int) -> bool:
    return bias is None or bias.shape == (outputs,)


def _fits(spikes, *others: Tensor | None) -> bool:
    """Whether there are bits, and plain tensors of the same dtype beside them that kernels have code for."""
    return (
        isinstance(spikes, SpikeTensor)
        and spikes.packed is not None
        and spikes.numel() > 0
        and is_plain_memory(spikes)
        and spikes.dtype in _DTYPES
        and spikes.device.type == "cpu"
        and all(each is None or (is_plain(each) and each.dtype is spikes.dtype) for each in others)
    )


def _layout(spikes: SpikeTensor) -> bool | None:
    """Whether [P, C, H, W] lie channels_last; None where they lie neither so nor contiguously."""
    if spikes.is_contiguous(memory_format=torch.channels_last):
        return True
    return False if spikes.is_contiguous() else None


def _pays(kind: str, spikes: SpikeTensor, pixels: int, weight: Tensor, geometry: _Geometry) -> bool:
    """Whether to skip zeros: where it was asked for, or is faster at the firing rate of these spikes.

    Args:
        kind: A key of `calls`.
        spikes: The input.
        pixels: Of the output, all frames together.
        weight: [O, C, KH, KW].
        geometry: Of the convolution.
    """
    skip = spikes.always
    if not skip and not _here.dense and skips_zeros(spikes.device, spikes.dtype):
        of_weight = kind == "weight gradient"
        limit = measured.limit(spikes.dtype, pixels, tuple(weight.shape), geometry.stride, of_weight=of_weight)
        skip = limit > 0 and spikes._memory.count() <= limit * spikes.numel()
    calls[kind, "cpu" if skip else "torch"] += 1
    return skip


_kernel = functools.partial(kernel_module, "spike_conv", "cpu")
