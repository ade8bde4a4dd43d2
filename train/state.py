"""All that a run's training consists of at a moment, and its way into a checkpoint and back."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from seal_fast.train import checkpoint, ranks
from seal_fast.train.batches import Batches
from seal_fast.train.errors import NonFiniteError, UsageError
from seal_fast.train.meters import Meters
from seal_fast.train.resume import difference

_PARTS = ("net", "optimizer", "scheduler", "scaler")
_CONTENT = (*_PARTS, "epoch", "step", "best", "meters", "order", "random", "options")


class State:
    """What changes while a run trains.

    Args:
        net: The network.
        optimizer: Its optimiser.
        scheduler: Of the learning rate.
        scaler: Of the gradient.

    Attributes:
        epoch: Epochs that are finished.
        step: Steps of the next one that are done.
        best: Result of the best epoch so far; None before the first.
        meters: State of the meters after those steps; None after none.
    """

    def __init__(self, net, optimizer, scheduler, scaler):
        self.net, self.optimizer, self.scheduler, self.scaler = net, optimizer, scheduler, scaler
        self.epoch, self.step = 0, 0
        self.best: dict | None = None
        self.meters: dict | None = None
        self._order: int | None = None
        self._random: list[dict] | None = None

    def content(self, args: argparse.Namespace, batches: Batches, meters: Meters | None = None) -> dict:
        """What a checkpoint holds; all ranks call it, and any may save it.

        Raises:
            NonFiniteError: A loss was not finite: such a state is not saved.
        """
        return {
            **{name: getattr(self, name).state_dict() for name in _PARTS},
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "meters": meters.state() if meters else None,
            "order": batches.digest(),
            "random": ranks.gathered(_random_state()),
            "options": vars(args),
        }

    def check(self, content: dict, path: Path, args: argparse.Namespace) -> None:
        """See whether a checkpoint is one of this run.

        Raises:
            UsageError: It is not.
        """
        missing = [name for name in _CONTENT if name not in content]
        if missing:
            raise UsageError(f"checkpoint {path} is not the last.pt of a run: it holds no {missing[0]}.")
        other = difference(content["options"], args)
        if other:
            raise UsageError(f"--resume: {path} belongs to a run with other options: {other}.")
        checkpoint.require_match(self.net, content["net"], path, "this run's network")

    def load(self, content: dict) -> None:
        """Take over a checkpoint."""
        for name in _PARTS:
            getattr(self, name).load_state_dict(content[name])
        self.epoch, self.step, self.best = content["epoch"], content["step"], content["best"]
        self.meters, self._order, self._random = content["meters"], content["order"], content["random"]

    def lengthen(self, epochs: int) -> float:
        """Let the epochs that come have the learning rates that a run of `epochs` epochs has for them.

        Returns:
            The next epoch's.
        """
        if isinstance(self.scheduler, torch.optim.lr_scheduler.CosineAnnealingLR):
            done = self.scheduler.last_epoch
            share = (1 + math.cos(math.pi * done / epochs)) / 2
            self.scheduler.T_max = epochs
            self.scheduler._last_lr = [base * share for base in self.scheduler.base_lrs]
            for group, rate in zip(self.optimizer.param_groups, self.scheduler._last_lr, strict=True):
                group["lr"] = rate
        return float(self.scheduler.get_last_lr()[0])

    def begin(self, batches: Batches, seed: int) -> int:
        """Set the samples and the random numbers of the epoch at hand, after the steps of it that are done.

        Returns:
            The epoch's number.

        Raises:
            UsageError: The steps that are done were not of these samples in this order.
        """
        epoch = self.epoch + 1
        batches.start(epoch, self.step)
        # Of each epoch and rank its own, so that a resumed run draws the same ones.
        torch.manual_seed(seed * 100_003 + epoch + 1_000_003 * ranks.rank())
        if self.step:
            if self._order != batches.digest():
                raise UsageError(
                    f"--resume: the samples or their order have changed since step {self.step} of epoch {epoch}: "
                    "the data is another, or torch shuffles in another way."
                )
            if len(self._random) == ranks.size():
                _set_random_state(self._random[ranks.rank()])
        return epoch


def require_finite(net: torch.nn.Module, step: int) -> None:
    """See whether all weights are finite after a step; waits for the device.

    Raises:
        NonFiniteError: They are not, so the gradient of a finite loss was not.
    """
    if not torch.stack([parameter.isfinite().all() for parameter in net.parameters()]).all():
        raise NonFiniteError(step, {})


def _random_state() -> dict:
    """Of torch on the host and on the rank's GPU; the trainers draw from no other generator."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": gpu}


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
