"""Modules with a state between calls, under the names that SpikingJelly gives to its parts.

SpikingJelly's functions and monitors ask with isinstance for classes of its own. Where it has been imported before a
module is made, that module is therefore an instance of the class of the same name there as well; nothing here imports
it.
"""

from __future__ import annotations

import copy
import functools
import sys

import torch
from torch import nn

STEP_MODES = ("s", "m")


class MemoryModule(nn.Module):
    """A module with memories: values by name that are kept between calls, and return to where they began in `reset`.

    Attributes:
        step_mode: "m" for inputs [T, ...], "s" for the input of one time step.
    """

    _original = None  # the class that `convert` found here
    _is_function = False  # whether functional_forward is running

    def __new__(cls, *args, **kwargs):  # noqa: D102
        return object.__new__(related(cls))

    def __init__(self, step_mode: str = "m"):
        nn.Module.__init__(self)  # not super(): a related class would run its own
        self._memories = {}
        self._memories_rv = {}
        self.step_mode = step_mode

    @property
    def step_mode(self) -> str:  # noqa: D102
        return self._step_mode

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value not in STEP_MODES:
            raise ValueError(f"step_mode must be 's' or 'm'; got {value!r}.")
        self._step_mode = value

    def supported_step_mode(self) -> tuple[str, ...]:
        """The step modes that the module has."""
        return STEP_MODES

    def register_memory(self, name: str, value) -> None:
        """Add a memory, an attribute that starts as `value` and is `value` again after `reset`.

        Raises:
            ValueError: The module has an attribute of that name.
        """
        if hasattr(self, name):
            raise ValueError(f"name must be that of no attribute of the module; got {name!r}.")
        self._memories[name] = value
        self.set_reset_value(name, value)

    def set_reset_value(self, name: str, value) -> None:
        """Let the memory be `value` after each reset from now on."""
        self._memories_rv[name] = copy.deepcopy(value)

    def get_reset_value(self, name: str):
        """What the memory is after a reset."""
        return self._memories_rv[name]

    def memories(self):
        """The values of all memories."""
        for name in self._memories:
            yield getattr(self, name)

    def named_memories(self):
        """The memories as pairs of name and value."""
        for name in self._memories:
            yield name, getattr(self, name)

    def reset(self) -> None:
        """Let every memory be what it was at first: the next call starts at rest."""
        for name in self._memories:
            value = self._memories_rv[name]
            # Dynamo traces no deepcopy before torch 2.12.
            self._memories[name] = value if isinstance(value, (int, float)) else copy.deepcopy(value)

    def detach(self) -> None:
        """Keep the memories, but cut their graphs: for backpropagation through time in parts."""
        self._memories.update(_detached(self._memories))

    def functional_forward(self, inputs: tuple, states: tuple, **options) -> tuple[tuple, tuple]:
        """Outputs for `inputs`, and memories after them, where `states` are the memories before; none is kept."""
        kept = dict(self._memories)
        self._memories.update(zip(kept, states, strict=True))
        self._is_function = True
        try:
            outputs = self.forward(*inputs, **options)
            return outputs if isinstance(outputs, tuple) else (outputs,), tuple(self._memories.values())
        finally:
            self._is_function = False
            self._memories.update(kept)

    def __getattr__(self, name: str):
        memories = self.__dict__.get("_memories", ())
        return memories[name] if name in memories else nn.Module.__getattr__(self, name)

    def __setattr__(self, name: str, value) -> None:
        memories = self.__dict__.get("_memories", ())
        if name in memories:
            memories[name] = value
        else:
            nn.Module.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._memories:
            del self._memories[name], self._memories_rv[name]
        else:
            nn.Module.__delattr__(self, name)

    def __dir__(self):
        return sorted({*nn.Module.__dir__(self), *self._memories})

    def __getstate__(self) -> dict:
        """Copies and pickles keep the memories, but not the graph that made them."""
        return {**self.__dict__, "_memories": _detached(self._memories)}

    def __reduce_ex__(self, protocol):
        return _blank, (type(self)._plain(), self._original), self.__getstate__()

    @classmethod
    def _plain(cls) -> type[MemoryModule]:
        """The class itself, where this one stands for it."""
        return cls.__dict__.get("_stands_for", cls)

    def _apply(self, fn, recurse: bool = True):
        """Moves and casts of the module take the memories along."""
        nn.Module._apply(self, fn, recurse)
        for values in (self._memories, self._memories_rv):
            values.update({name: fn(value) for name, value in values.items() if isinstance(value, torch.Tensor)})
        return self

    def _replicate_for_data_parallel(self):
        replica = nn.Module._replicate_for_data_parallel(self)
        replica._memories = dict(self._memories)
        return replica


def _detached(values: dict) -> dict:
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def related(cls: type[MemoryModule], original: type | None = None) -> type[MemoryModule]:
    """`cls`, or its subclass that is one of `original` too, or else of SpikingJelly's class of the same name."""
    if "_stands_for" in cls.__dict__:
        return cls
    if original is None:
        base = sys.modules.get("spikingjelly.activation_based.base")
        neurons = sys.modules.get("spikingjelly.activation_based.neuron")
        names = [parent.__name__ for parent in cls.__mro__ if parent.__module__ == f"{__package__}.neuron"]
        found = [getattr(neurons, name, None) for name in names]
        original = next((theirs for theirs in (*found, getattr(base, "MemoryModule", None)) if theirs), None)
    return cls if original is None else _relative(cls, original)


@functools.cache
def _relative(cls: type[MemoryModule], original: type) -> type[MemoryModule]:
    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls, original), {**named, "_stands_for": cls})


def _blank(cls: type[MemoryModule], original: type | None) -> MemoryModule:
    return object.__new__(related(cls, original))


def reset_net(network: nn.Module) -> None:
    """Call `reset` of every module in `network` that has one, so that its neurons start at rest: before each batch."""
    for module in network.modules():
        if callable(getattr(module, "reset", None)):
            module.reset()


def detach_net(network: nn.Module) -> None:
    """Call `detach` of every module in `network` that has one: neurons keep their potential, and cut its graph."""
    for module in network.modules():
        if callable(getattr(module, "detach", None)):
            module.detach()
