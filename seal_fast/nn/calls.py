"""Calls of a neuron that gradient checkpointing repeats: they must start from where they did at first.

A checkpoint calls the network once more within the backward pass, when the neuron's potential is that after its last
call, or after a reset or detach. Both kinds of torch.utils.checkpoint can be told from what is active during a call:
the hooks for saved tensors of one with use_reentrant=False, whose frame those of its repetition refer to; and the node
of one with use_reentrant=True. Under each that is running, the neuron records where its first call started, as long as
the frame or node lives. Under anything else that repeats calls, the last call is taken to be the one.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref

import torch
from torch import Tensor, nn

_HOOKS = torch._C._autograd
_top_hooks = getattr(_HOOKS, "_top_saved_tensors_default_hooks", None)  # torch 2.6 does not tell


def is_backward() -> bool:
    """Whether this thread is running a backward pass."""
    return torch._C._current_graph_task_id() != -1


def refuse_compiling_in_backward() -> None:
    """Raise where a call that starts from a carried potential is compiled within a backward pass: a repeated one."""
    if is_backward():
        raise RuntimeError(_NOT_RECORDED)


# Dynamo runs it while it compiles. torch.compiler.assume_constant_result says the same, but imports the compiler.
refuse_compiling_in_backward._dynamo_marked_constant = True


class Calls:
    """The calls of one neuron."""

    @classmethod
    def of(cls, neuron: nn.Module) -> Calls:
        """Those of `neuron`, recorded from now on if they have not been before."""
        return neuron.__dict__.get("_recorded") or neuron.__dict__.setdefault("_recorded", cls())

    @staticmethod
    def end(neuron: nn.Module) -> None:
        """Record that the potential is another than the last call left: after a reset, a detach, or one set by hand."""
        calls = neuron.__dict__.get("_recorded")
        if calls is not None:
            calls._end()

    def __init__(self):
        self._records: weakref.WeakKeyDictionary[object, Record] = weakref.WeakKeyDictionary()  # of checkpoints
        self._cut: Record | None = None  # of the reentrant checkpoint that left the potential, without its graph
        self._count = 0  # calls since the last end before the last of them
        self._start: float | Tensor | None = None  # of the last call; None: it is not known any more
        self._start_has_graph = False  # asked for when it is recorded: Dynamo, which may trace the end, cannot ask
        self._earlier: float | Tensor | None = None  # of the last call before that end
        self._ended = False  # whether an end followed
        self._repeated = -1  # the last graph task that repeated a call of no checkpoint of torch's

    def add(self, start: float | Tensor | type) -> None:
        """Record a call, not one that is repeated, that started from the potential `start`."""
        running, _ = _checkpoints()
        records = {checkpoint: self._record(checkpoint, start) for checkpoint in running}
        has_graph = isinstance(start, Tensor) and start.grad_fn is not None
        cut = isinstance(start, Tensor) and not has_graph  # it has one where it is an output of the checkpoint
        if cut and self._cut not in (None, *records.values()) and (torch.is_grad_enabled() or running):
            self._cut.followed = True
        self._cut = next((record for checkpoint, record in records.items() if _is_reentrant(checkpoint)), None)
        if self._ended:
            self._earlier = self._start if self._count == 1 else None
            self._count, self._ended = 0, False
        self._count += 1
        self._start, self._start_has_graph = start, has_graph

    def _end(self) -> None:
        """Record an end, and forget a start with a graph, whose memory would stay."""
        self._ended, self._cut = True, None
        if self._start_has_graph:
            self._start, self._start_has_graph = None, False

    def start(self, now: float | Tensor | type) -> float | Tensor | type:
        """The potential from which a call within a backward pass starts, where the neuron's is `now`.

        Raises:
            RuntimeError: Calls that started from different potentials may be the repeated one, or none was recorded.
        """
        _, repeating = _checkpoints()
        if repeating is not None:
            record = self._records.get(repeating)
            if record is None or record.followed:
                raise RuntimeError(_NOT_RECORDED if record is None else _CUT)
            return record.v
        if not self._count:
            return now
        other = self._repeated == torch._C._current_graph_task_id() and not _equal(self._start, self._earlier)
        if self._count > 1 or self._start is None or other:
            raise RuntimeError(_AMBIGUOUS)
        return self._start

    def repeat(self, start: float | Tensor | type, v: Tensor | type) -> bool:
        """Record that a call within a backward pass came from `start` to v; whether the neuron keeps its potential."""
        running, repeating = _checkpoints()
        for checkpoint in running:  # within what is repeated
            self._record(checkpoint, start)
        if repeating is not None:
            self._records[repeating].v = v
            return True
        self._repeated = torch._C._current_graph_task_id()
        return self._count > 0

    def repeating(self) -> Record | None:
        """The record of the checkpoint that is repeating calls now, which holds the potential meanwhile."""
        _, repeating = _checkpoints()
        return None if repeating is None else self._records.get(repeating)

    def _record(self, checkpoint: object, start: float | Tensor | type) -> Record:
        if checkpoint not in self._records:
            self._records[checkpoint] = Record(start)
        return self._records[checkpoint]


class Record:
    """Where the first call under a checkpoint started, and the potential while a backward pass repeats its calls.

    Attributes:
        followed: Whether a call started from the potential that a reentrant checkpoint left, whose gradient is lost.
    """

    def __init__(self, start: float | Tensor | type):
        self.followed = False
        # Without its graph, which may refer to the checkpoint and would keep it alive. Under a reentrant one no graph
        # refers to it, and it is the repeated calls that give the potential its gradient.
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


def _checkpoints() -> tuple[list[object], object | None]:
    """Checkpoints of torch's that are running now, and the innermost one that is repeating its calls."""
    running, repeating = _by_hooks() if _top_hooks and _top_hooks(False) else ([], None)
    if repeating is None and is_backward() and _is_reentrant(torch._C._current_autograd_node()):
        repeating = torch._C._current_autograd_node()
    # A Function's forward switches forward-mode AD off, which no_grad does not.
    if not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():
        forward, caller = _reentrant()[0], sys._getframe(1)
        while caller is not None:
            if caller.f_code is forward:
                running.append(caller.f_locals["ctx"])
            caller = caller.f_back
    return running, repeating


@functools.cache
def _reentrant() -> tuple[types.CodeType, type]:
    """What runs a checkpoint with use_reentrant=True, and its node in the graph."""
    from torch.utils.checkpoint import CheckpointFunction  # not before it is needed: torch 2.6 imports SymPy with it

    return inspect.unwrap(CheckpointFunction.forward).__code__, CheckpointFunction._backward_cls


def _is_reentrant(checkpoint: object) -> bool:
    return isinstance(checkpoint, _reentrant()[1])


def _by_hooks() -> tuple[list[object], object | None]:
    """The same, of those that are not reentrant."""
    running, popped = [], []
    try:
        while hooks := _top_hooks(False):
            frame, repeats = _frame(hooks[0])
            if repeats:
                return running, frame
            if frame is not None:
                running.append(frame)
            _HOOKS._pop_saved_tensors_default_hooks()
            popped.append(hooks)
        return running, None
    finally:
        for hooks in reversed(popped):
            _HOOKS._push_saved_tensors_default_hooks(*hooks)


def _frame(hook) -> tuple[object | None, bool]:
    """The frame of the checkpoint whose hook it is, and whether that repeats calls."""
    for cell in getattr(inspect.unwrap(hook), "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # it is empty yet
            continue
        repeats = isinstance(held, weakref.ref)
        frame = held() if repeats else held
        if type(frame).__name__ == "_CheckpointFrame":
            return frame, repeats
    return None, False


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
_CUT = (
    "a checkpoint with use_reentrant=True cuts the graph of the potential that its call leaves, so that a call that "
    "starts from it would lose its gradient: use use_reentrant=False, or detach_net or reset_net between the calls."
)
