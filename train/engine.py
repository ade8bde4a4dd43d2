"""One training loop and one evaluation loop, for every task."""

from __future__ import annotations

import time

import torch
from tqdm import tqdm

from seal_fast.models.snn import Neuron
from seal_fast.train.feed import Feed
from seal_fast.train.options import UsageError
from seal_fast.train.step import Step, autocast

READ_EVERY = 10  # steps between readings of the meters: each reading waits for the device


class TrainingError(RuntimeError):
    """Why a run cannot go on, in one sentence."""


class Meters:
    """Sums of losses and hits that stay on the device until they are read."""

    def __init__(self, device: torch.device):
        self.sums: dict[str, torch.Tensor] = {}
        self.images = 0
        self.device = device

    def add(self, outcome, labels: torch.Tensor) -> None:
        """Add one step's losses, weighted by its images, and its hits."""
        hits = (outcome.logits.float().mean(0).argmax(-1) == labels).sum()
        values = {"loss": outcome.loss.detach(), **outcome.parts}
        for name, value in values.items():
            self._add(name, value.float() * len(labels))
        self._add("accuracy", hits)
        self.images += len(labels)

    def _add(self, name: str, value: torch.Tensor) -> None:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64
        total = self.sums.setdefault(name, torch.zeros((), dtype=dtype, device=self.device))
        total += value

    def read(self) -> dict[str, float]:
        """Means so far; waits for the device."""
        names = list(self.sums)
        values = torch.stack([self.sums[name] for name in names]).tolist()
        return {name: value / self.images for name, value in zip(names, values, strict=True)}


def train_epoch(
    step: Step,
    feed: Feed,
    *,
    title: str,
    epochs_left: int,
) -> dict[str, float]:
    """Train on every batch of the feed once.

    Args:
        step: What is done with a batch.
        feed: Batches of (inputs, labels).
        title: Shown before the progress bar.
        epochs_left: Epochs after this one, for the time that remains.

    Returns:
        Mean losses by name, accuracy, seconds, images_per_second, and data_wait, the share of the time spent waiting
        for data.

    Raises:
        TrainingError: The loss is not finite.
    """
    step.task.network.train()
    meters = Meters(step.device)
    start, waited = time.perf_counter(), feed.waited
    last, last_images, last_waited = start, 0, waited
    # disable=None: no bar where the output is no terminal.
    shown = "{desc} |{bar:8}| {n_fmt}/{total_fmt}{postfix}"
    bar = tqdm(total=len(feed), desc=title, bar_format=shown, leave=False, dynamic_ncols=True, disable=None)
    for number, (inputs, labels) in enumerate(feed, 1):
        outcome = step(inputs, labels)
        meters.add(outcome, labels)
        bar.update()
        if number % READ_EVERY == 0 or number == len(feed):
            means = meters.read()
            if not means["loss"] < float("inf"):
                raise TrainingError(f"the loss is not finite ({title.strip()}, step {number}): {means}.")
            now = time.perf_counter()
            steps = number % READ_EVERY or READ_EVERY
            remaining = (now - start) / number * (len(feed) - number + epochs_left * len(feed))
            bar.set_postfix_str(
                # What matters most comes first: a narrow terminal cuts the end.
                f"ends in {tqdm.format_interval(int(remaining))}, loss {means['loss']:.3f}, "
                f"acc {means['accuracy']:.1%}, {(meters.images - last_images) / (now - last):.0f} img/s, "
                f"step {1e3 * (now - last) / steps:.0f} ms, data {1e3 * (feed.waited - last_waited) / steps:.0f} ms"
            )
            last, last_images, last_waited = now, meters.images, feed.waited
    bar.close()
    seconds = time.perf_counter() - start
    speed = {
        "seconds": seconds,
        "images_per_second": meters.images / seconds,
        "data_wait": (feed.waited - waited) / seconds,
    }
    return {**means, **speed}


class SpikeRecorder:
    """Firing rate of each neuron layer over an evaluation, and the spikes of its first sample for a raster.

    Attributes:
        raster: layer name -> spikes bool [T, units] of up to `UNITS` evenly spaced neurons; for the first sample seen.
    """

    UNITS = 48

    def __init__(self, network: torch.nn.Module, time_steps: int):
        self.time_steps = time_steps
        self.layers = {name: module for name, module in network.named_modules() if isinstance(module, Neuron)}
        self.sums: dict[str, torch.Tensor] = {}
        self.counts = dict.fromkeys(self.layers, 0)
        self.raster: dict[str, torch.Tensor] = {}

    def __enter__(self) -> SpikeRecorder:
        self._handles = [
            module.register_forward_hook(lambda _module, _args, output, name=name: self._record(name, output))
            for name, module in self.layers.items()
        ]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, name: str, output) -> None:
        spikes = output[0] if isinstance(output, tuple) else output
        total = spikes.sum(dtype=torch.float32).double()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] += spikes.numel()
        if name not in self.raster:
            sample = spikes.unflatten(0, (self.time_steps, -1))[:, 0].flatten(1)
            units = torch.linspace(0, sample.shape[1] - 1, min(self.UNITS, sample.shape[1])).long()
            self.raster[name] = sample[:, units.to(sample.device)] > 0

    def rates(self) -> dict[str, float]:
        """Mean spikes per neuron and time step of each layer, in the network's order."""
        return {name: self.sums[name].cpu().item() / self.counts[name] for name in self.layers if name in self.sums}


@torch.no_grad()
def evaluate(task, feed: Feed, *, device: torch.device, amp: str) -> dict:
    """Accuracy on every batch of the feed.

    Returns:
        accuracy; accuracy_at: of the mean over the first t steps, for t = 1…T; firing_rate by layer; raster by layer.
    """
    task.network.eval()
    hits, images = None, 0
    time_steps = getattr(task.network, "time_steps", 1)
    with SpikeRecorder(task.network, time_steps) as recorder:
        for inputs, labels in tqdm(feed, desc="evaluation", unit="step", leave=False, disable=None):
            with autocast(device, amp):
                logits = task.predict(inputs)
            predictions = logits.float().cumsum(0).argmax(-1)  # the mean over t steps has the argmax of their sum
            batch_hits = (predictions == labels).sum(1)
            hits = batch_hits if hits is None else hits + batch_hits
            images += len(labels)
    if images == 0:
        raise UsageError("the validation set is empty.")
    accuracy_at = [count / images for count in hits.tolist()]
    return {
        "accuracy": accuracy_at[-1],
        "accuracy_at": accuracy_at,
        "firing_rate": recorder.rates(),
        "raster": {name: spikes.cpu() for name, spikes in recorder.raster.items()},
    }
