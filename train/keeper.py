"""When a run's state is saved inside an epoch: every so many steps or minutes, and when a signal asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from signal import SIGINT, SIGTERM

from seal_fast.train import ranks
from seal_fast.train.errors import StoppedError
from seal_fast.train.meters import Meters
from seal_fast.train.stopping import CODES, Signals

AGREE_EVERY = 10  # steps between two talks of several ranks about signals and minutes


class Keeper:
    """Saves what `save` saves when it is time.

    Args:
        save: Called with the steps done and the epoch's meters, on all ranks at the same step.
        signals: What has been received.
        steps: Save at each multiple of it; 0 for never.
        seconds: Save when so many have passed since the last time; 0 for never.
    """

    def __init__(self, save: Callable[[int, Meters], None], signals: Signals, *, steps: int = 0, seconds: float = 0):
        self._save, self._signals = save, signals
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

    def _agreed(self) -> tuple[int | None, bool]:
        """The signal that any rank received, and whether the first rank's clock says to save."""
        received = self._signals.received
        due = ranks.first() and bool(self._seconds) and time.monotonic() - self.saved >= self._seconds
        terminated, interrupted, due = ranks.total([received == SIGTERM, received == SIGINT, due])
        return (SIGTERM if terminated else SIGINT if interrupted else None), bool(due)

    def _stop(self, number: int | None) -> None:
        if number:
            sentence = f"stopped by {'SIGTERM' if number == SIGTERM else 'Ctrl-C'}; all is saved, and --resume goes on."
            raise StoppedError(CODES[number], sentence)
