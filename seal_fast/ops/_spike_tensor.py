"""Spikes as a tensor that holds bits, and becomes numbers for whoever needs them."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..backends import resolve
from ..kernels.packing import reference
from ._dispatch import kernel_module

_ATEN = torch.ops.aten

_settling = threading.Lock()
# Called with numbers [N] and the bits that they take the place of.
SETTLED: list[Callable[[Tensor, Tensor], None]] = []


class _Memory:
    """What a tensor of spikes and its views share: bits, or numbers once something may write to them.

    Attributes:
        packed: Bits in the order in which spikes lie in memory, uint8 [ceil(N/8)]; nobody writes to them.
        numbers: [N] in the tensors' dtype, in the place of bits.
    """

    def __init__(self, packed: Tensor | None, numbers: Tensor | None = None):
        self.packed, self.numbers = packed, numbers
        self._count: int | None = None

    @property
    def held(self) -> Tensor:
        """The memory, of whichever kind."""
        packed = self.packed  # read once: another thread may take it away
        return self.numbers if packed is None else packed

    def count(self) -> int:
        """How many bits are set; they have to be held."""
        packed = self.packed
        if self._count is None and packed is not None:
            self._count = _packing(packed).count(packed)
        return self._count

    def unpacked(self, N: int, dtype: torch.dtype) -> Tensor:
        """The spikes [N], in memory of their own where bits are held."""
        packed = self.packed
        if packed is None:
            return self.numbers
        return _packing(packed).unpack(packed.view(1, -1), N, dtype)[0]

    def settle(self, N: int, dtype: torch.dtype) -> Tensor:
        """Hold numbers from now on."""
        with _settling:
            if self.numbers is None:
                numbers = self.unpacked(N, dtype)
                for told in SETTLED:
                    told(numbers, self.packed)
                self.numbers = numbers
                self.packed = None
            return self.numbers


class SpikeTensor(Tensor):
    """Zeros and ones that are held as bits, an eighth of a byte each, with the shape and strides of dense numbers.

    Neurons give it where a kernel for the CPU fires, and convolutions and linear layers add weights where its bits are
    set. It is a tensor like any other: whatever else is done to it gets numbers, which are made for that operation
    alone. Where an operation writes to it or gives a view that could be written to, as an index does, it holds numbers
    from then on, and convolutions of it are dense.
    """

    _memory: _Memory

    @staticmethod
    def __new__(cls, memory: _Memory, size, stride, dtype: torch.dtype, device: torch.device):
        return Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=dtype, device=device)

    def __init__(self, memory: _Memory, size, stride, dtype, device):
        self._memory = memory
        self.always = False  # whether kernels are to skip zeros even where there are few

    @classmethod
    def of(cls, packed: Tensor, size, stride: tuple[int, ...], dtype: torch.dtype) -> SpikeTensor:
        """Spikes from bits in the order of memory, whose N is a multiple of 8 or lies in one row."""
        return cls(_Memory(packed.view(-1)), size, stride, dtype, packed.device)

    @property
    def packed(self) -> Tensor | None:
        """The bits in the order in which the spikes lie in memory, uint8 [ceil(N/8)]; None where numbers are held."""
        return self._memory.packed

    @property
    def held(self) -> Tensor:
        """The memory, of whichever kind."""
        return self._memory.held

    def kept(self) -> SpikeTensor:
        """These spikes as they are now, for a graph: bits stay bits there."""
        view = self.detach()
        view._memory = copy.copy(self._memory)
        return view

    def firing_rate(self) -> float:
        """The share of ones; of numbers that were written meanwhile their mean."""
        return float(self.detach().mean(dtype=torch.float64))

    def numbers(self, *, lasting: bool = False) -> Tensor:
        """The spikes as a plain tensor without a graph; with `lasting`, in memory that they share with this one."""
        N = self.numel()
        flat = self._memory.settle(N, self.dtype) if lasting else self._memory.unpacked(N, self.dtype)
        return flat.as_strided(self.shape, self.stride())

    def alike(self, size, stride) -> SpikeTensor:
        """A view: the same memory in another shape."""
        with _mode_of(self):
            view = SpikeTensor(self._memory, size, stride, self.dtype, self.device)
        view.always = self.always
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None:
            result = rule(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_numbers(func, args, kwargs)

    # torch.compile takes a tensor apart by these.

    def __tensor_flatten__(self):
        return ["held"], (self.dtype, self._memory.packed is not None)

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        dtype, is_packed = context
        held = inner["held"]
        return SpikeTensor(_Memory(held) if is_packed else _Memory(None, held), size, stride, dtype, held.device)

    # What would look for numbers at the address of a tensor.

    def numpy(self, *, force: bool = False):
        return self._plain().numpy(force=force)

    def tolist(self):
        return self.numbers().tolist()

    def data_ptr(self) -> int:
        return self.numbers(lasting=True).data_ptr()

    def apply_(self, function):
        self.numbers(lasting=True).apply_(function)
        return self

    def map_(self, tensor, function):
        self.numbers(lasting=True).map_(tensor, function)
        return self

    def map2_(self, x, y, function):
        self.numbers(lasting=True).map2_(x, y, function)
        return self

    @property
    def data(self) -> SpikeTensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise TypeError("data of a SpikeTensor cannot be replaced: copy_ writes to it, and clone gives a plain tensor.")

    def share_memory_(self):
        self.numbers(lasting=True).share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.held.is_shared()

    def __dlpack__(self, **options):
        return self._plain().__dlpack__(**options)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()

    def __deepcopy__(self, memo):
        if not self.is_leaf:
            return copy.deepcopy(self.clone(), memo)  # which refuses
        return copy.deepcopy(self.numbers(), memo).requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):
        return self._plain().__reduce_ex__(protocol)

    def __repr__(self, **options):
        return f"Spike{repr(self._plain()).replace('tensor', 'Tensor', 1)}"

    def _plain(self) -> Tensor:
        """A plain tensor of these numbers, which refuses what this one would."""
        return self.clone() if self.requires_grad else self.numbers()


# aten operator -> what serves it without numbers, or returns NotImplemented
RULES: dict[torch._ops.OpOverload, Callable] = {}


def rule(*operators: torch._ops.OpOverload) -> Callable[[Callable], Callable]:
    """Register what serves these operators: it is given the operator and its arguments."""

    def register(serve: Callable) -> Callable:
        RULES.update(dict.fromkeys(operators, serve))
        return serve

    return register


def _on_numbers(func, args, kwargs):
    """The operator on plain tensors."""
    if _is_composite(func):
        result = func.decompose(*args, **kwargs)  # as in inference mode; its parts may have a rule
        if result is not NotImplemented:
            return result
    if func in _OF_SHAPE or torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(
            f"{func} cannot change the shape of a SpikeTensor in place: clone() gives a plain one."
        )
    schema = func._schema
    # Schemas of others, such as the collectives of torch.distributed, do not tell what is written to.
    lasting = schema.is_mutable or any(each.alias_info for each in schema.returns) or func.namespace != "aten"
    spikes = next((each for each in args if isinstance(each, SpikeTensor)), None)
    with _mode_of(spikes) if lasting and spikes is not None else contextlib.nullcontext():
        args_of, kwargs_of = tree_map_only(SpikeTensor, lambda each: each.numbers(lasting=lasting), (args, kwargs))
        result = func(*args_of, **kwargs_of)
    if not schema.is_mutable or not isinstance(result, Tensor):
        return result
    # What was written to is what is returned, as the very tensor that was given.
    places = {argument.name: place for place, argument in enumerate(schema.arguments)}
    written = next(each.name for each in schema.arguments if each.alias_info is not None and each.alias_info.is_write)
    return kwargs[written] if written in kwargs else args[places[written]]


@functools.cache
def _is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


_OF_SHAPE = (_ATEN.resize_.default, _ATEN.set_.source_Tensor, _ATEN.set_.source_Storage_storage_offset)


def _mode_of(spikes: SpikeTensor):
    """In inference mode or not, as when the spikes were made: their views are of the same kind."""
    is_inference = spikes.is_inference()
    if is_inference is torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(is_inference)


def _blank(spikes: SpikeTensor, **options) -> Tensor:
    """A tensor of the same shape and strides with no elements that anybody has read or written."""
    return torch.empty_strided(spikes.shape, spikes.stride(), **{"dtype": spikes.dtype, "device": "meta"} | options)


@rule(
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN._reshape_alias.default,
    _ATEN.unsqueeze.default,
    _ATEN.squeeze.default,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.permute.default,
    _ATEN.transpose.int,
    _ATEN.t.default,
    _ATEN.alias.default,
    _ATEN.detach.default,
)
def _view(func, spikes, *args, **kwargs):
    """Another order of the axes or another shape of the same memory, while torch.compile traces as well."""
    if func in (_ATEN.detach.default, _ATEN.alias.default):
        return spikes.alike(spikes.shape, spikes.stride())
    shaped = func(_blank(spikes), *args, **kwargs)
    return spikes.alike(shaped.shape, shaped.stride())


@rule(_ATEN._to_copy.default)
def _cast(func, spikes, *, dtype=None, **options):
    """Zeros and ones are exact in every floating dtype, and their bits the same."""
    given = {name for name, value in options.items() if value not in (None, False, torch.preserve_format)}
    if given or spikes.packed is None or dtype is None or not dtype.is_floating_point or not is_plain_memory(spikes):
        return NotImplemented
    memory = copy.copy(spikes._memory)  # what is written to one of them does not show in the other
    cast = SpikeTensor(memory, spikes.shape, spikes.stride(), dtype, spikes.device)
    cast.always = spikes.always
    return cast


@rule(
    *(getattr(_ATEN, f"{name}_like").default for name in ("empty", "zeros", "ones", "full", "rand", "randn")),
    *(getattr(_ATEN, f"new_{name}").default for name in ("empty", "zeros", "ones", "full", "empty_strided")),
)
def _fresh(func, spikes, *args, **kwargs):
    """Nothing is read of the spikes but how they lie."""
    if not isinstance(spikes, SpikeTensor):
        return NotImplemented
    return func(_blank(spikes, device=spikes.device), *args, **kwargs)


@rule(_ATEN.sum.default, _ATEN.mean.default)
def _total(func, spikes, *, dtype=None):
    """From the number of bits that are set."""
    if spikes.packed is None or not is_plain_memory(spikes) or not (dtype or spikes.dtype).is_floating_point:
        return NotImplemented
    total = spikes._memory.count()
    value = total / spikes.numel() if func is _ATEN.mean.default else total
    return torch.full((), value, dtype=torch.float64, device=spikes.device).to(dtype or spikes.dtype)


def is_plain_memory(spikes: SpikeTensor) -> bool:
    """Whether kernels can read the bits; they cannot while torch.compile traces, nor for a mode with fake tensors."""
    held = spikes.held
    return type(held) is Tensor and held.device.type != "meta" and not torch._C._len_torch_dispatch_stack()


def plain(tensor: Tensor | None) -> Tensor | None:
    """The tensor, of spikes a copy as numbers, for operators that read elements at addresses; gradients pass."""
    return tensor.clone() if isinstance(tensor, SpikeTensor) else tensor


def _packing(packed: Tensor):
    if type(packed) is not Tensor or torch._C._len_torch_dispatch_stack():
        return reference
    return kernel_module("packing", "cpu") if packing_backend(packed.device) == "cpu" else reference


def packing_backend(device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend that makes numbers of bits."""
    try:
        return resolve("auto", "lif", device, dtype)
    except ValueError:  # SEAL_FAST_BACKEND cannot run here, and the neuron had a backend of its own
        return "torch"
