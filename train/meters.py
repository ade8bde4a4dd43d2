"""What an epoch's training adds up to, and whether its losses are finite."""

from __future__ import annotations

import time

import torch

from seal_fast.train import ranks
from seal_fast.train.errors import NonFiniteError


class Meters:
    """Sums of losses and hits that stay on the device until they are read.

    A step whose loss is not finite counts in no sum. All ranks read together, and get the numbers of all of them.

    Args:
        device: Where the losses are.
        patience: How many losses in a row may be not finite, because GradScaler skips their steps; 0 for none.

    Attributes:
        images: Images seen by all ranks at the last reading.
        skipped: Steps that GradScaler skipped, a tensor once there is one.
    """

    def __init__(self, device: torch.device, *, patience: int = 0):
        self.device, self.patience = device, patience
        self.names: list[str] = []
        self.images, self.skipped = 0, 0
        self._before = 0.0, 0.0
        self._feed, self._begun, self._waited = None, 0.0, 0.0
        self._sums: torch.Tensor | None = None
        self._own_images = 0
        self._in_a_row = 0
        self._unread: list[tuple[int, torch.Tensor]] = []

    def add(self, outcome, labels: torch.Tensor, step: int = 0) -> None:
        """Add the losses, weighted by its images, and the hits of a step or of a part of it."""
        values = {"loss": outcome.loss.detach(), **outcome.parts}
        hits = (outcome.logits.float().mean(0).argmax(-1) == labels).float().mean()
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        one = torch.ones((), dtype=dtype, device=self.device)
        row = torch.stack([*(value.to(dtype) for value in values.values()), hits.to(dtype), one])
        counted = torch.where(row.isfinite().all(), row * len(labels), 0)
        self.names = [*values, "accuracy"]
        self._sums = counted if self._sums is None else self._sums + counted
        self._own_images += len(labels)
        self._unread.append((step, row))

    def read(self) -> dict[str, float]:
        """Means so far, over all ranks; waits for the device.

        Raises:
            NonFiniteError: A loss was not finite, or more than `patience` of them in a row.
        """
        *sums, counted, images = self._totals()
        self.images = int(images)
        return {
            name: value / counted if counted else float("nan") for name, value in zip(self.names, sums, strict=True)
        }

    def _totals(self) -> list[float]:
        own = self._sums.tolist()
        rows = torch.stack([row for _, row in self._unread]).tolist() if self._unread else []
        steps = [step for step, _ in self._unread]
        self._unread = []
        bad = [(step, row) for step, row in zip(steps, rows, strict=True) if not all(map(_finite, row))]
        *totals, any_bad = ranks.total([*own, self._own_images, len(bad)])
        self._judge(steps, [found for one in ranks.gathered(bad) for found in one] if any_bad else [])
        return totals

    def _judge(self, steps: list[int], bad: list[tuple[int, list[float]]]) -> None:
        rows = dict(reversed(bad))  # of a step that went wrong on several ranks, what the first of them saw
        for step in dict.fromkeys(steps):
            self._in_a_row = self._in_a_row + 1 if step in rows else 0
            if self._in_a_row > self.patience:
                parts = dict(zip(self.names[:-1], rows[step], strict=False))
                raise NonFiniteError(step, parts, self._in_a_row)

    def state(self) -> dict:
        """What a checkpoint keeps, of all ranks together; reads, and raises as `read` does."""
        *sums, images = self._totals()
        return {
            "names": self.names,
            "sums": sums,
            "images": int(images),
            "skipped": int(self.skipped),
            "in_a_row": self._in_a_row,
            "clock": self.clock(),
        }

    def load(self, state: dict) -> None:
        """Go on from what `state` gave; the first rank takes the sums of all."""
        own = state if ranks.first() else {"sums": [0.0] * len(state["sums"]), "images": 0}
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.names = list(state["names"])
        self._sums = torch.tensor(own["sums"], dtype=dtype, device=self.device)
        self._own_images, self.images = own["images"], state["images"]
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._before = tuple(state["clock"])

    def resume_clock(self, feed) -> None:
        """Let the epoch's time run from now on, and count what `feed` waits."""
        self._feed, self._begun, self._waited = feed, time.perf_counter(), feed.waited

    def clock(self) -> tuple[float, float]:
        """Seconds that the epoch has taken, in all processes that went on with it, and those of waiting for data."""
        seconds, waited = self._before
        return seconds + time.perf_counter() - self._begun, waited + self._feed.waited - self._waited


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
