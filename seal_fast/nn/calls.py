"""Calls of a neuron that gradient checkpointing repeats: each must start from the potential from which it did at first.

A checkpoint calls the network once more within the backward pass, when the neuron's potential is that after its last
call, or after a reset or detach. Both kinds of torch.utils.checkpoint can be told from what is active during a call:
the hook for saved tensors of a checkpoint with use_reentrant=False, whose frame the repeated calls' hook refers to; and
the node of one with use_reentrant=True. Under each, the neuron records where its calls started, as long as the frame or
node lives. Calls under anything else that repeats them are told by their number alone.
"""

from __future__ import annotations

import inspect
import sys
import weakref

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.6 does not tell
_FUNCTION = inspect.unwrap(CheckpointFunction.forward).__code__


def is_backward() -> bool:
    """Whether this thread is running a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Calls:
    """The calls of one neuron."""

    def __init__(self):
        self._of_checkpoint: weakref.WeakKeyDictionary[object, Record] = weakref.WeakKeyDictionary()
        self._count = 0  # calls since the last end before the last of them
        self._start: float | Tensor | None = None  # of the last call; None: it is not known any more
        self._earlier: float | Tensor | None = None  # of the last call before that end
        self._ended = False  # whether an end followed
        self._repeated = -1  # the last graph task that repeated a call of no checkpoint of torch's

    def add(self, start: float | Tensor | type) -> None:
        """Record a call, not one that is repeated, that started from the potential `start`."""
        checkpoint, _ = _checkpoint()
        if checkpoint is not None and checkpoint not in self._of_checkpoint:
            self._of_checkpoint[checkpoint] = Record(start)
        if self._ended:
            self._earlier = self._start if self._count == 1 else None
            self._count, self._ended = 0, False
        self._count += 1
        self._start = start

    def end(self) -> None:
        """Record that the potential is another than the last call left: after a reset, a detach, or one set by hand.

        A start with a graph, whose memory would stay, is forgotten.
        """
        self._ended = True
        if isinstance(self._start, Tensor) and self._start.grad_fn is not None:
            self._start = None

    def start(self, now: float | Tensor | type) -> float | Tensor | type:
        """The potential from which a call within a backward pass starts, where the neuron's is `now`.

        Raises:
            RuntimeError: Calls that started from different potentials may be the repeated one, or none was recorded.
        """
        record, repeats = self._record()
        if record is not None:
            return record.v
        if repeats:
            raise RuntimeError(_NOT_RECORDED)
        if not self._count:
            return now
        other = self._repeated == torch._C._current_graph_task_id() and not _equal(self._start, self._earlier)
        if self._count > 1 or self._start is None or other:
            raise RuntimeError(_AMBIGUOUS)
        return self._start

    def repeat(self, start: float | Tensor | type, v: Tensor | type) -> bool:
        """Record that a call within a backward pass came from `start` to v; whether the neuron keeps its potential."""
        record, _ = self._record()
        if record is not None:
            record.v = v
            return True
        checkpoint, _ = _checkpoint()
        if checkpoint is not None and checkpoint not in self._of_checkpoint:  # it is within one that is repeated
            self._of_checkpoint[checkpoint] = Record(start)
        self._repeated = torch._C._current_graph_task_id()
        return self._count > 0

    def repeating(self) -> Record | None:
        """The record of the checkpoint that is repeating calls now, which holds the potential meanwhile."""
        return self._record()[0]

    def _record(self) -> tuple[Record | None, bool]:
        """Of the checkpoint that is repeating calls now, and whether there is one."""
        checkpoint, repeats = _checkpoint()
        return (self._of_checkpoint.get(checkpoint) if repeats else None), repeats


class Record:
    """Where the first call under a checkpoint started, and the potential while a backward pass repeats its calls."""

    def __init__(self, start: float | Tensor | type):
        # Without its graph, which would keep the checkpoint alive. Under a reentrant one no graph refers to it, and the
        # gradient of the potential takes its way through that of the repeated calls.
        if isinstance(start, Tensor) and torch.is_grad_enabled():
            start = start.detach().requires_grad_(start.requires_grad)
        self._start = start
        self._task = -1  # the graph task that repeats the calls
        self._v = None

    @property
    def v(self) -> float | Tensor | type:
        """The potential now."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._v = task, self._start
        return self._v

    @v.setter
    def v(self, value: float | Tensor | type) -> None:
        self._task, self._v = torch._C._current_graph_task_id(), value


def _checkpoint() -> tuple[object | None, bool]:
    """The innermost checkpoint of torch's that is running, if any, and whether it is repeating calls."""
    hooks = _top_hooks(False) if _top_hooks else None
    if hooks:
        for cell in getattr(inspect.unwrap(hooks[0]), "__closure__", None) or ():
            held = cell.cell_contents
            repeats = isinstance(held, weakref.ref)
            frame = held() if repeats else held
            if type(frame).__name__ == "_CheckpointFrame":
                return frame, repeats
    if is_backward():
        node = torch._C._current_autograd_node()
        return (node, True) if isinstance(node, CheckpointFunction._backward_cls) else (None, False)
    if torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled():  # a Function's forward switches both off
        return None, False
    caller = sys._getframe(1)
    while caller is not None and caller.f_code is not _FUNCTION:
        caller = caller.f_back
    return (None if caller is None else caller.f_locals["ctx"]), False


def _equal(left, right) -> bool:
    return left is right or (isinstance(left, float) and isinstance(right, float) and left == right)


_AMBIGUOUS = (
    "gradient checkpointing needs neurons that are called once between resets, as their calls start from different "
    "potentials, and it cannot tell which of several calls, with or without a detach between, is repeated. Step mode "
    "'m' runs all time steps in one call, and newer releases of torch tell calls under torch.utils.checkpoint apart."
)
_NOT_RECORDED = (
    "gradient checkpointing repeats a call of this neuron that was compiled, or was not made at first: torch.compile "
    "may compile a network with checkpoints, but a checkpoint cannot repeat a compiled one."
)
