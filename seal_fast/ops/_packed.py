"""Spikes kept as bits for the backward pass, whoever saves them."""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..backends import resolve
from ..kernels.packing import reference
from ._dispatch import kernel_module


class packed_spikes(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801
    """Within this context, autograd keeps the spikes of seal-fast's neurons as bits: an eighth of a byte for each.

    Whatever saves a spike tensor for its backward pass, be it a convolution, a linear layer or a pooling, keeps the
    bits in its place; each tensor is packed once, by the kernel that fires. The backward pass, which may come after the
    context has ended, unpacks exactly what was there. A tensor that was changed in place since is kept as it is.

        with seal_fast.packed_spikes():
            loss = criterion(model(images), labels)
        loss.backward()
    """

    def __init__(self):
        self._bits: dict[int, _Bits] = {}
        super().__init__(self._pack, _unpack)

    def __enter__(self):
        super().__enter__()
        self._outer = getattr(_here, "context", None)
        _here.context = self
        return self

    def __exit__(self, *error):
        _here.context = self._outer
        self._bits.clear()
        return super().__exit__(*error)

    def _add(self, spikes: Tensor, packed: Tensor) -> None:
        for key in [key for key, bits in self._bits.items() if bits.storage.expired()]:
            del self._bits[key]
        storage = spikes.untyped_storage()
        self._bits[storage._cdata] = _Bits(StorageWeakRef(storage), spikes._version, packed, spikes[0].numel())

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if tensor.layout != torch.strided or not tensor.dtype.is_floating_point:
            return tensor
        bits = self._bits.get(tensor.untyped_storage()._cdata)
        if bits is None or bits.storage.expired() or bits.version != tensor._version:
            return tensor
        place = tensor.shape, tensor.stride(), tensor.storage_offset()
        return _Saved(bits.packed, bits.N, tensor.dtype, *place)


class _Bits(NamedTuple):
    """What stands for a spike tensor [T, ...] whose memory is T rows of N spikes."""

    storage: StorageWeakRef  # while it lives, no other storage has its key
    version: int  # of its contents
    packed: Tensor
    N: int


class _Saved(NamedTuple):
    """What stands for a view of a spike tensor in autograd's graph."""

    packed: Tensor
    N: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


_here = threading.local()


def wanted() -> bool:
    """Whether neurons that fire now should pack their spikes."""
    if torch.compiler.is_compiling():
        return False
    return getattr(_here, "context", None) is not None and torch.is_grad_enabled()


def keep(spikes: Tensor, packed: Tensor) -> None:
    """Let the context know the bits of spikes [T, ...], whose T rows are dense and lie one after the other."""
    _here.context._add(spikes, packed)


_kernel = functools.partial(kernel_module, "packing")


def _unpack(saved: Tensor | _Saved) -> Tensor:
    if not isinstance(saved, _Saved):
        return saved
    try:
        backend = resolve("auto", "lif", saved.packed.device, saved.dtype)
    except ValueError:  # SEAL_FAST_BACKEND cannot run here, and the neuron had a backend of its own
        backend = "torch"
    unpack = reference.unpack if backend == "torch" else _kernel(backend).unpack
    return unpack(saved.packed, saved.N, saved.dtype).as_strided(saved.shape, saved.stride, saved.offset)
