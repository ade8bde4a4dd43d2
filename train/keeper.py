"""When a run's state is saved inside an epoch: every so many steps or minutes, and when a signal asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from signal import Signals as Number

from seal_fast.train import ranks
from seal_fast.train.errors import StoppedError
from seal_fast.train.meters import Meters
from seal_fast.train.stopping import CODES, Signals, name_of

AGREE_EVERY = 10  # steps between two talks of several ranks about signals and minutes


class Keeper:
    """Calls `save` when a checkpoint is due.

    Args:
        save: Called with the steps done and the epoch's meters, on all ranks at the same step.
        signals: What has been received.
        goes_on: The command that goes on with the run, for whoever stopped it.
        steps: Save at each multiple of it; 0 for never.
        seconds: Save when so many have passed since the last time; 0 for never.
    """

    def __init__(
        self,
        save: Callable[[int, Meters], None],
        signals: Signals,
        *,
        goes_on: str,
        steps: int = 0,
        seconds: float = 0,
    ):
        self._save, self._signals, self._goes_on = save, signals, goes_on
        self._steps, self._seconds = steps, seconds
        self.saved = time.monotonic()

    def after(self, step: int, meters: Meters, of: int) -> None:
        """Save after a step of the `of` steps of an epoch, if it is time.

        Raises:
            StoppedError: A signal was received; the state is saved.
        """
        number, due = None, False
        if ranks.size() == 1 or step % AGREE_EVERY == 0 or step == of:
            number, due = self._agreed()
        if number or due or (self._steps and step % self._steps == 0):
            self._save(step, meters)
            self.saved = time.monotonic()
        self._stop(number)

    def between(self, step: int, meters: Meters) -> None:
        """Let a signal end an evaluation after all steps of an epoch; of several ranks, it first ends."""
        if ranks.size() == 1 and self._signals.received:
            self._save(step, meters)
            self._stop(self._signals.received)

    def after_epoch(self) -> None:
        """Let a signal end the run after an epoch that is saved."""
        self.saved = time.monotonic()
        self._stop(self._agreed()[0])

    def _agreed(self) -> tuple[Number | None, bool]:
        """The signal that any rank received, and whether the first rank's clock says to save."""
        due = ranks.first() and bool(self._seconds) and time.monotonic() - self.saved >= self._seconds
        *received, due = ranks.total([*(self._signals.received == number for number in CODES), due])
        return next((number for number, count in zip(CODES, received, strict=True) if count), None), bool(due)

    def _stop(self, number: Number | None) -> None:
        if number:
            sentence = f"stopped by {name_of(number)}; all is saved, and {self._goes_on} goes on."
            raise StoppedError(CODES[number], sentence)
