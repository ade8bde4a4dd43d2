"""One training step: forward, loss, backward and update; launched piece by piece, or as one CUDA graph."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from seal_fast import packed_spikes
from seal_fast.train.errors import TrainingError
from seal_fast.train.tasks import Outcome

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str):
    """The autocast context of `--amp`."""
    enabled = amp != "off"
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp] if enabled else None, enabled=enabled)


class Step:
    """A step of a task.

    Args:
        task: A task of `tasks.py`.
        optimizer: Its optimiser.
        scaler: Gradient scaler; enabled for float16 only.
        device: Where to train.
        amp: "off", "bf16" or "fp16".
        packed: Whether spikes wait for the backward pass as bits.

    Attributes:
        skipped: Whether GradScaler skipped the last update, a tensor; None where it skips none.
    """

    def __init__(
        self,
        task,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        *,
        device: torch.device,
        amp: str,
        packed: bool = False,
    ):
        self.task = task
        self.optimizer = optimizer
        self.scaler = scaler
        self.device = device
        self.amp = amp
        self.packed = packed
        self.skipped: Tensor | None = None
        self._one = torch.ones((), device=device)

    def __call__(
        self, inputs: Tensor, labels: Tensor, *, weight: float = 1.0, first: bool = True, last: bool = True
    ) -> Outcome:
        """Train on a batch, or on one part of it after the other.

        Args:
            inputs: Images [B, ...] or events [T, B, ...] on the device.
            labels: [B].
            weight: The part's share of the batch, times the number of ranks, over which gradients are averaged: so the
                gradient is that of the mean over the batch, however it is cut.
            first: Whether the batch begins with this part.
            last: Whether it ends with it; only then the ranks exchange gradients, and the optimiser steps.

        Returns:
            What the task found, its loss detached: a loss that keeps its graph would tie the parameters' gradients to
            the stream of this step.
        """
        if first:
            self.optimizer.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if last else self.task.unsynchronised():
            with autocast(self.device, self.amp), packed_spikes() if self.packed else contextlib.nullcontext():
                outcome = self.task(inputs, labels)
            self.scaler.scale(outcome.loss if weight == 1 else outcome.loss * weight).backward()
        if last:
            self._update()
        return outcome._replace(loss=outcome.loss.detach())

    def _update(self) -> None:
        if not self.scaler.is_enabled():
            self.optimizer.step()
            return
        before = self.scaler.scale(self._one)  # the scale, without waiting for the device
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped = self.scaler.scale(self._one) < before


class GraphedStep(Step):
    """A step that is captured in a CUDA graph, so that the host launches one thing instead of a thousand.

    Batches of `batch_size` are copied to one place. The first of them are trained on as ever, while kernels compile and
    libraries choose theirs; then the step is captured, and replayed. Batches of another size, as the last of an epoch
    may be, are never captured. What a replay returns is overwritten by the next. The graph keeps the memory of a whole
    step for itself.

    A teacher's forward pass does not depend on the student's. With `overlap` it is a branch of the graph, so that its
    convolutions, which compute, can run while the student's neurons wait for memory. The teacher's temporary tensors
    then have memory of their own: four feature maps at once.

    Args:
        batch_size: Images of the batches that are captured.
        overlap: Whether a teacher runs beside the student, on a stream of its own.
    """

    WARM_UP = 3  # steps before the capture

    def __init__(
        self,
        task,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        *,
        batch_size: int,
        overlap: bool = True,
        **options,
    ):
        super().__init__(task, optimizer, scaler, **options)
        self.batch_size = batch_size
        self.overlap = overlap
        for group in optimizer.param_groups:  # a graph keeps numbers as they were, and reads tensors anew
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(self.device)
        self.steps = 0
        self.batch: tuple[Tensor, Tensor] | None = None
        self.outcome: Outcome | None = None
        self.replay = None

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Of the steps before the capture and of the capture: libraries keep memory for each stream that they meet."""
        return torch.cuda.Stream(self.device)

    def __call__(self, inputs: Tensor, labels: Tensor, **whole) -> Outcome:  # noqa: D102
        if len(labels) != self.batch_size:
            return super().__call__(inputs, labels)
        if self.batch is None:
            self.batch = torch.empty_like(inputs), torch.empty_like(labels)
        for held, given in zip(self.batch, (inputs, labels), strict=True):
            held.copy_(given)
        self.steps += 1
        if self.steps <= self.WARM_UP:
            return self._warm_up(*self.batch)
        if self.replay is None:
            self.replay = self._capture(self._captured)
        self.replay()
        return self.outcome

    def _captured(self) -> None:
        self.outcome = Step.__call__(self, *self.batch)

    def _warm_up(self, inputs: Tensor, labels: Tensor) -> Outcome:
        """On the streams of the capture to come, and on the very tensors: kernels depend on their layout."""
        if self.overlap and self.task.side_stream is None:
            self.task.side_stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outcome = super().__call__(inputs, labels)
        current.wait_stream(self.stream)
        return outcome

    def _capture(self, function):
        """What runs `function` again on the device; capturing does not run it.

        Raises:
            TrainingError: It cannot be captured.
        """
        self.optimizer.zero_grad(set_to_none=True)  # gradients get places that belong to the graph
        torch.cuda.synchronize(self.device)
        free_workspaces()
        # The thread that pins batches may go on meanwhile.
        try:
            graph = torch.cuda.CUDAGraph()
            with self._capturable(), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                function()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"a step cannot be captured in a CUDA graph ({reason}); pass --cuda_graph false."
            ) from error
        return graph.replay

    @contextlib.contextmanager
    def _capturable(self):
        """Adam wants to be told that it is captured; where it is told and is not, it warns."""
        told = [group for group in self.optimizer.param_groups if "capturable" in group]
        for group in told:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in told:
                group["capturable"] = False


def free_workspaces() -> None:
    """Free what cuBLAS keeps for each thread and stream, 32 MiB each on Hopper: a capture gets its own in its pool.

    As torch.compile does before it captures. Nothing may run on the device meanwhile.
    """
    free = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # where torch was built with CUDA
    if free is not None:
        free()
