"""What a run tells of each epoch: metrics.csv, TensorBoard, plots and a line on the terminal."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

from seal_fast.train import disk, plots, ranks
from seal_fast.train.tasks import TERMS

LOSSES = {"loss", "ce", *(term for terms in TERMS.values() for term in terms)}
PLOT_EVERY = 60.0  # seconds, at the least, between two drawings of the plots


class Log:
    """The log of a run; the first rank alone writes it.

    Args:
        folder: The run's.
        first_epoch: The first that comes. TensorBoard forgets what an interrupted run logged of it and of later ones.
    """

    def __init__(self, folder: Path, first_epoch: int):
        self.folder = folder
        self._first_epoch = first_epoch
        self._writer = None
        self._drawn = time.monotonic()

    def __enter__(self) -> Log:
        if ranks.first():
            from torch.utils.tensorboard import SummaryWriter  # takes two seconds, which --help should not

            self._writer = SummaryWriter(str(self.folder), purge_step=self._first_epoch)
        return self

    def __exit__(self, *exception) -> None:
        if self._writer is not None:
            self._writer.close()

    def epoch(self, row: dict[str, float]) -> None:
        """Add an epoch's row to metrics.csv and to TensorBoard.

        It takes the place of rows of the same epoch and later: an interrupted run may have logged what it did not save.
        """
        kept = [other for other in self._rows() if int(other["epoch"]) < row["epoch"]]
        file = io.StringIO(newline="")
        table = csv.DictWriter(file, fieldnames=list(row), extrasaction="ignore")
        table.writeheader()
        table.writerows([*kept, {name: f"{value:.6g}" for name, value in row.items()}])
        disk.write(file.getvalue().encode(), self.folder / "metrics.csv")
        for name, value in row.items():
            self._writer.add_scalar(name, value, int(row["epoch"]))
        self._writer.flush()

    def _rows(self) -> list[dict[str, str]]:
        path = self.folder / "metrics.csv"
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def plot(self, raster: dict, best: int, *, at_once: bool) -> None:
        """Draw the plots, at once or if it has been a while.

        Args:
            raster: Spikes by layer.
            best: The epoch whose network is kept.
            at_once: Whether it does not matter when they were drawn last.
        """
        if at_once or time.monotonic() - self._drawn > PLOT_EVERY:
            plots.plot_run(self.folder, best)
            plots.plot_raster(raster, self.folder / "spike_raster.png")
            self._drawn = time.monotonic()


def row_of(epoch: int, learning_rate: float, trained: dict, result: dict) -> dict[str, float]:
    """An epoch's row of metrics.csv."""
    speed = ("seconds", "images_per_second", "data_wait")
    row = {"epoch": epoch, "lr": learning_rate}
    row |= {f"train_{name}": value for name, value in trained.items() if name not in speed}
    row["val_accuracy"] = result["accuracy"]
    if result["firing_rate"]:
        row |= {f"val_accuracy_t{t}": value for t, value in enumerate(result["accuracy_at"], start=1)}
    row |= {f"firing_rate/{name}": value for name, value in result["firing_rate"].items()}
    return row | {name: trained[name] for name in speed}


def line_of(epoch: int, epochs: int, trained: dict, result: dict) -> str:
    """An epoch in one line."""
    losses = ", ".join(f"{name} {value:.3f}" for name, value in trained.items() if name in LOSSES)
    return (
        f"epoch {epoch}/{epochs}: {losses}, train {trained['accuracy']:.2%}, val {result['accuracy']:.2%}, "
        f"{trained['images_per_second']:.0f} img/s, data wait {trained['data_wait']:.0%}, {trained['seconds']:.1f} s"
    )
