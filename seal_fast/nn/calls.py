"""Calls of a neuron that gradient checkpointing repeats: each must start from the potential from which it did at first.

A checkpoint calls the network once more within the backward pass, when the neuron's potential is that after its last
call, or after a reset or detach. So the neuron records where its calls started, as long as they can be repeated: a call
whose output is in a graph, until that graph is gone; and one within the forward of an autograd.Function, as checkpoints
with use_reentrant=True make it, until the next one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


def is_backward() -> bool:
    """Whether this thread is running a backward pass, within which calls are repeated ones."""
    return torch._C._current_graph_task_id() != -1


class Calls:
    """Of one neuron.

    Attributes:
        given: Whether the potential was assigned within the backward pass that is running: whoever repeats calls knows
            where they start, as SpikingJelly's checkpoints do.
    """

    def __init__(self):
        self.given = False
        self._graphs: list[_Call] = []
        self._last: _Call | None = None  # of those within a Function

    def add(self, start: float | Tensor, spikes: Tensor) -> None:
        """Record a call that started from the potential `start`."""
        self.given = False
        self._graphs = [call for call in self._graphs if call.alive()]
        node = spikes.grad_fn
        if node is not None:
            alive = node.metadata.setdefault("seal_fast.nn.calls", _Alive())
            self._graphs.append(_Call(start, weakref.ref(alive)))
        elif _within_function():
            earlier = self._last
            ambiguous = earlier is not None and not (earlier.repeated or earlier.ended)
            self._last = _Call(start, None, ambiguous and not _equal(earlier.start, start))

    def end(self) -> None:
        """Record that the potential was reset: where others follow, no call within a Function is repeated any more."""
        if self._last is not None:
            self._last.ended = True

    def start(self, now: float | Tensor, repeat: bool) -> float | Tensor:
        """The potential from which a call within a backward pass starts.

        Args:
            now: The neuron's potential.
            repeat: Whether the call follows, and is repeated by that.

        Raises:
            RuntimeError: Calls that started from different potentials may be the repeated one.
        """
        calls = [call for call in self._graphs if call.alive()] + ([] if self._last is None else [self._last])
        if self.given or not calls:
            return now
        left = [call for call in calls if not call.repeated] or calls
        found = left[-1]
        if any(call.ambiguous or not _equal(call.start, found.start) for call in left):
            raise RuntimeError(_AMBIGUOUS)
        found.repeated |= repeat
        return found.start


def _within_function() -> bool:
    """Whether the forward of an autograd.Function is running; unlike no_grad, it switches forward-mode AD off, too."""
    return not (torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())


class _Call:
    __slots__ = ("alive", "ambiguous", "ended", "repeated", "start")

    def __init__(self, start: float | Tensor, alive: Callable[[], object] | None, ambiguous: bool = False):
        self.start = start
        self.alive = alive  # whether its graph is
        self.ambiguous = ambiguous  # whether another one that started elsewhere may be meant
        self.ended = self.repeated = False


class _Alive:
    """Lives as long as the node of a graph that has it among its metadata."""


def _equal(left: float | Tensor, right: float | Tensor) -> bool:
    return left is right or (isinstance(left, float) and isinstance(right, float) and left == right)


_AMBIGUOUS = (
    "gradient checkpointing needs neurons that are called once between resets, as their calls start from different "
    "potentials; this one was called several times, with or without a detach between. Step mode 'm' runs all time "
    "steps in one call, and a backward pass after each call, before the next one, leaves only that to repeat."
)
