"""Progress bars on standard error; none where it is no terminal, and on the first rank alone."""

from __future__ import annotations

import sys
import time

from seal_fast.train import ranks
from seal_fast.train.feed import Feed
from seal_fast.train.meters import Meters


def bar(**settings):
    """A bar of tqdm's, with its settings. Use it as a context: what ends it clears its line for the next message."""
    from tqdm import tqdm  # --help works without it

    return tqdm(leave=False, disable=None if ranks.first() else True, **settings)


class Progress:
    """The progress bar of an epoch, on the first rank.

    Args:
        title: Shown before it.
        feed: Whose waiting is shown.
        meters: Whose images are counted.
        steps: Of the epoch.
        done: Of them, before this process went on with it.
        epochs_left: Epochs after this one, for the time that remains.
    """

    def __init__(self, title: str, feed: Feed, meters: Meters, *, steps: int, done: int, epochs_left: int):
        self.feed, self.meters = feed, meters
        self.steps, self.done, self.epochs_left = steps, done, epochs_left
        self.begun = self.last = time.perf_counter()
        self.last_step, self.last_images, self.last_waited = done, meters.images, feed.waited
        shown = "{desc} |{bar:8}| {n_fmt}/{total_fmt}{postfix}"
        self._bar = bar(total=steps, initial=done, desc=title, bar_format=shown, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def step(self) -> None:
        """Count a step."""
        self._bar.update()

    def say(self, line: str) -> None:
        """Print a line on standard output, above the bar."""
        if ranks.first():
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def show(self, step: int, means: dict[str, float]) -> None:
        """Tell what the meters read after a step."""
        now, images, waited = time.perf_counter(), self.meters.images, self.feed.waited
        steps, seconds = step - self.last_step, now - self.last
        left = self.steps - step + self.epochs_left * self.steps
        remaining = (now - self.begun) / (step - self.done) * left
        self._bar.set_postfix_str(
            # What matters most comes first: a narrow terminal cuts the end.
            f"ends in {self._bar.format_interval(int(remaining))}, loss {means['loss']:.3f}, "
            f"acc {means['accuracy']:.1%}, {(images - self.last_images) / seconds:.0f} img/s, "
            f"step {1e3 * seconds / steps:.0f} ms, data {1e3 * (waited - self.last_waited) / steps:.0f} ms"
        )
        self.last, self.last_step, self.last_images, self.last_waited = now, step, images, waited
