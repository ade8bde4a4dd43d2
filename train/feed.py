"""From a loader's batches to inputs on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from seal_fast.train.stopping import held


class Feed:
    """Batches of a loader on the device, finished there.

    On a GPU the copies and what finishes them run beside the step before, in a stream of their own; the host waits
    for the loader only.

    Args:
        loader: Batches (inputs, labels), or (inputs, labels, draws) with the random numbers that `finish` takes.
        device: Where they go.
        finish: What is left to do to a batch of inputs on the device; None for nothing.
        memory_format: Of what the networks get; see `arranged`.

    Attributes:
        waited: Seconds spent waiting for the loader so far. On a GPU, which has work while the host waits, it stands
            still for less than that.
    """

    def __init__(
        self,
        loader: Iterable,
        device: torch.device,
        finish: Callable[..., Tensor] | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.loader = loader
        self.device = device
        self.finish = finish
        self.memory_format = memory_format
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        asked = time.perf_counter()
        with held():
            batches = iter(self.loader)  # starts processes
        while True:
            batch = _next(batches)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield self._bring(*batch) if stream is None else self._bring_beside(stream, *batch)
            asked = time.perf_counter()

    def _bring(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        inputs, labels, *draws = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        finished = inputs if self.finish is None else self.finish(inputs, *draws)
        return arranged(finished, self.memory_format), labels

    def _bring_beside(self, stream: torch.cuda.Stream, *batch: Tensor) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(stream):
            batch = self._bring(*batch)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(stream)
        for tensor in batch:
            tensor.record_stream(current)  # their memory is not given away while the step uses it
        return batch


def arranged(inputs: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A batch as networks read it, so that no step has to copy it.

    Args:
        inputs: Images [B, C, H, W], events [B, T, C, H, W], or anything else, which is left alone.
        memory_format: Of the images, or of each time step of the events.

    Returns:
        Images [B, C, H, W]; events [T, B, C, H, W], whose rows [T·B, C, H, W] are a view.
    """
    if inputs.dim() == 4:
        return inputs.contiguous(memory_format=memory_format)
    if inputs.dim() != 5:
        return inputs
    steps = inputs.transpose(0, 1)
    shape = (steps.shape[0] * steps.shape[1], *steps.shape[2:])
    rows = torch.empty(shape, dtype=steps.dtype, device=steps.device, memory_format=memory_format)
    return rows.unflatten(0, steps.shape[:2]).copy_(steps)


def _next(batches: Iterator) -> tuple[Tensor, ...] | None:
    try:
        return next(batches, None)
    except (ConnectionError, EOFError) as error:
        if "DataLoader worker" in str(error):  # out of the dataset's own code
            raise
        # torch tells of a worker's death itself, unless the worker was about to hand a batch over.
        raise RuntimeError(f"DataLoader worker ended while it handed over a batch: {error!r}") from error
