"""Spikes kept as bits for the backward pass, whoever saves them."""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..backends import is_transformed
from ..kernels.packing import reference
from ._dispatch import kernel_module
from ._spike_tensor import SETTLED, SpikeTensor, packing_backend


class packed_spikes(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801
    """Within this context, autograd keeps the spikes of seal-fast's neurons as bits: an eighth of a byte for each.

    Whatever saves a spike tensor for its backward pass, be it a convolution, a linear layer or a pooling, keeps the
    bits in its place; each tensor is packed once, by the kernel that fires. The backward pass, which may come after the
    context has ended, unpacks exactly what was there. Spikes that were changed in place before they are saved are kept
    as they are. Where any other tensor is changed between forward and backward, the latter raises, as torch does.

        with seal_fast.packed_spikes():
            loss = criterion(model(images), labels)
        loss.backward()
    """

    def __init__(self):
        self._bits: dict[int, _Bits] = {}
        self._outer: list[packed_spikes | None] = []  # what was active at each entry: it may be within itself
        super().__init__(self._pack, _unpack)

    def __enter__(self):
        super().__enter__()
        self._outer.append(_here.context)
        _here.context = self
        return self

    def __exit__(self, *error):
        _here.context = self._outer.pop()
        if not self._outer:
            self._bits.clear()
        return super().__exit__(*error)

    def _add(self, spikes: Tensor, packed: Tensor) -> None:
        for key in [key for key, bits in self._bits.items() if bits.storage.expired()]:
            del self._bits[key]
        storage = spikes.untyped_storage()
        self._bits[storage._cdata] = _Bits(StorageWeakRef(storage), spikes._version, packed, spikes[0].numel())

    def _pack(self, tensor: Tensor) -> _Kept | _Saved:
        if isinstance(tensor, SpikeTensor) and tensor.packed is not None:
            return _Kept(tensor.kept(), tensor._version)
        if tensor.layout != torch.strided or not tensor.dtype.is_floating_point:
            return _Kept.of(tensor)
        memory = tensor.held if isinstance(tensor, SpikeTensor) else tensor
        bits = self._bits.get(memory.untyped_storage()._cdata)
        if bits is None or bits.storage.expired() or bits.version != tensor._version:
            return _Kept.of(tensor)
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


class _Kept(NamedTuple):
    """What stands for any other tensor: itself without its node, as a node that keeps its own output is never freed.

    A leaf, which has none, stays itself: whoever gives it other `data`, as do those who shard parameters, expects the
    backward pass to find that, and the memory of the former to be free.
    """

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Kept:
        """The tensor as it is now."""
        return cls(tensor if tensor.is_leaf else tensor.detach(), tensor._version)

    def unpack(self) -> Tensor:
        """The tensor, unless its contents have changed."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor needed for the gradient, {self.tensor.dtype} of shape {list(self.tensor.shape)}, has been "
                f"modified by an inplace operation: it is at version {self.tensor._version}; expected {self.version}."
            )
        return self.tensor


class _Here(threading.local):
    """What each thread has for itself."""

    context: packed_spikes | None = None  # the innermost one that it is within


_here = _Here()


def wanted() -> bool:
    """Whether neurons that fire now should pack their spikes."""
    if torch.compiler.is_compiling() or _here.context is None:
        return False
    return torch.is_grad_enabled() and not is_transformed()


def _keep_settled(numbers: Tensor, packed: Tensor) -> None:
    if wanted():
        keep(numbers.unsqueeze(0), packed.unsqueeze(0))


SETTLED.append(_keep_settled)


def keep(spikes: Tensor, packed: Tensor) -> None:
    """Let the context know the bits of spikes [T, ...], whose T rows are dense and lie one after the other."""
    _here.context._add(spikes, packed)


_kernel = functools.partial(kernel_module, "packing")


def _unpack(saved: _Kept | _Saved) -> Tensor:
    if isinstance(saved, _Kept):
        return saved.unpack()
    backend = packing_backend(saved.packed.device, saved.dtype)
    unpack = reference.unpack if backend == "torch" else _kernel(backend).unpack
    return unpack(saved.packed, saved.N, saved.dtype).as_strided(saved.shape, saved.stride, saved.offset)
