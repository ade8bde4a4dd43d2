"""PNG plots of a run: its curves, accuracy against time steps, and a spike raster."""

from __future__ import annotations

import csv
from pathlib import Path

import torch


def plot_run(folder: Path, best: int) -> None:
    """Draw curves.png and, for a student, accuracy_at_t.png from the run's metrics.csv.

    Args:
        folder: The run's.
        best: The epoch whose network is kept: of equal ones the trainer knows which.
    """
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    if rows:
        _curves(rows, folder / "curves.png")
        _accuracy_at(rows, best, folder / "accuracy_at_t.png")


def plot_raster(raster: dict[str, torch.Tensor], path: Path, layers: int = 4) -> None:
    """Draw the spikes of one sample in some layers from first to last.

    Args:
        raster: layer name -> bool [T, units].
        path: PNG file to write.
        layers: How many layers to show, evenly spaced.
    """
    if not raster:
        return
    names = list(raster)
    chosen = sorted({round(i * (len(names) - 1) / max(1, layers - 1)) for i in range(layers)})
    figure, axes = _figure(1, len(chosen), width=2.6)
    for axis, index in zip(axes, chosen, strict=True):
        spikes = raster[names[index]]
        steps, units = spikes.nonzero(as_tuple=True)
        axis.scatter(steps + 1, units, marker="|", s=30, color="black")
        axis.set(title=names[index], xlabel="time step", xlim=(0.5, len(spikes) + 0.5), ylim=(-1, spikes.shape[1]))
        axis.set_xticks(range(1, len(spikes) + 1))
    axes[0].set_ylabel("neuron (a sample of the layer)")
    _save(figure, path)


def _curves(rows: list[dict], path: Path) -> None:
    epochs = [row["epoch"] for row in rows]
    figure, (loss_axis, accuracy_axis) = _figure(1, 2)
    for name in rows[0]:
        if name.startswith("train_") and name != "train_accuracy":
            loss_axis.plot(epochs, [row[name] for row in rows], marker=".", label=name.removeprefix("train_"))
    loss_axis.set(title="training loss", xlabel="epoch")
    for name in ("train_accuracy", "val_accuracy"):
        accuracy_axis.plot(epochs, [100 * row[name] for row in rows], marker=".", label=name.split("_")[0])
    accuracy_axis.set(title="accuracy", xlabel="epoch", ylabel="%")
    for axis in (loss_axis, accuracy_axis):
        axis.legend()
        axis.grid(alpha=0.3)
    _save(figure, path)


def _accuracy_at(rows: list[dict], best: int, path: Path) -> None:
    names = [name for name in rows[-1] if name.startswith("val_accuracy_t")]
    if not names:
        return
    drawn = [(rows[-1], "last epoch")]
    drawn += [(row, f"best epoch ({best})") for row in rows if row["epoch"] == best]
    steps = range(1, len(names) + 1)
    figure, (axis,) = _figure(1, 1)
    for row, label in drawn:
        axis.plot(steps, [100 * row[name] for name in names], marker="o", label=label)
    axis.set(title="accuracy of the mean over the first t steps", xlabel="t", ylabel="%", xticks=steps)
    axis.legend()
    axis.grid(alpha=0.3)
    _save(figure, path)


def _figure(rows: int, columns: int, width: float = 4.5):
    # Imported here, because it takes a second that no other command should pay; Figure alone needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)[0]


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
