"""One training loop and one evaluation loop, for every task."""

from __future__ import annotations

from collections.abc import Callable

import torch

from seal_fast.models.snn import Neuron
from seal_fast.train import ranks
from seal_fast.train.batches import Batches
from seal_fast.train.errors import TrainingError, UsageError
from seal_fast.train.feed import Feed
from seal_fast.train.keeper import Keeper
from seal_fast.train.meters import Meters
from seal_fast.train.progress import Progress, bar
from seal_fast.train.step import Step, autocast
from seal_fast.train.threads import Watch

READ_EVERY = 10  # steps between readings of the meters: each reading waits for the device
SKIPS = 20  # losses in a row that may be not finite where GradScaler skips their steps
SMALLEST_SCALE = 1e-4  # GradScaler's, which halves with each step that it skips: below it something else is wrong


def train_epoch(
    step: Step,
    feed: Feed,
    batches: Batches,
    *,
    title: str,
    epochs_left: int,
    meters: Meters | None = None,
    keeper: Keeper | None = None,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Train on every batch of the feed once.

    Args:
        step: What is done with a batch.
        feed: Batches of (inputs, labels), or the parts of them.
        batches: What the feed brings, begun after the steps that are done.
        title: Shown before the progress bar.
        epochs_left: Epochs after this one, for the time that remains.
        meters: What the steps that are done added up to; by default nothing.
        keeper: Saves inside the epoch.
        watch: Knows whether other programs hold the processors.

    Returns:
        Mean losses by name, accuracy, seconds, images_per_second, and data_wait, the share of the time spent waiting
        for data; with float16, skipped, the steps that GradScaler skipped.

    Raises:
        TrainingError: The loss is not finite.
        StoppedError: A signal was received.
    """
    step.task.network.train()
    scaler = step.scaler
    meters = meters or Meters(step.device)
    with Progress(title, feed, meters, steps=batches.steps, done=batches.done, epochs_left=epochs_left) as progress:
        meters.resume_clock(feed)
        brought = iter(feed)
        for number in range(batches.done + 1, batches.steps + 1):
            parts = batches.parts(number)
            for part in range(1, parts + 1):
                inputs, labels = next(brought)
                weight = ranks.size() * len(labels) / batches.images(number)
                meters.add(step(inputs, labels, weight=weight, first=part == 1, last=part == parts), labels, number)
            if step.skipped is not None:
                meters.skipped = meters.skipped + step.skipped
            progress.step()
            if number % READ_EVERY == 0 or number == batches.steps:
                progress.show(number, meters.read())
                if watch is not None and (sentence := watch.sentence()):
                    progress.say(sentence)
                if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
                    raise TrainingError(f"the gradient is not finite at step {number}, as in most of the steps before")
            if keeper is not None:
                keeper.after(number, meters, batches.steps)
    means = meters.read()
    seconds, waited = meters.clock()
    if scaler.is_enabled():
        means["skipped"] = int(meters.skipped)
    speed = {"seconds": seconds, "images_per_second": meters.images / seconds, "data_wait": waited / seconds}
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
        """Mean spikes per neuron and time step of each layer, in the network's order, over all ranks."""
        own = [self.sums[name].cpu().item() if name in self.sums else 0.0 for name in self.layers]
        totals = ranks.total([*own, *self.counts.values()])
        pairs = zip(self.layers, totals[: len(own)], totals[len(own) :], strict=True)
        return {name: spikes / count for name, spikes, count in pairs if count}


@torch.no_grad()
def evaluate(task, feed: Feed, *, device: torch.device, amp: str, pause: Callable[[], None] = lambda: None) -> dict:
    """Accuracy on every batch of the feed, and on those of the other ranks.

    Args:
        task: A task of `tasks.py`.
        feed: Batches of (inputs, labels).
        device: Where to evaluate.
        amp: "off", "bf16" or "fp16".
        pause: Called before each batch.

    Returns:
        accuracy; accuracy_at: of the mean over the first t steps, for t = 1…T; firing_rate by layer; raster by layer.
    """
    task.network.eval()
    hits, images = torch.zeros(task.time_steps, dtype=torch.int64, device=device), 0
    shown = bar(total=len(feed), desc="evaluation", unit="step", dynamic_ncols=True)
    with shown, SpikeRecorder(task.network, task.time_steps) as recorder:
        for inputs, labels in feed:
            pause()
            with autocast(device, amp):
                logits = task.predict(inputs)
            predictions = logits.float().cumsum(0).argmax(-1)  # the mean over t steps has the argmax of their sum
            hits = hits + (predictions == labels).sum(1)
            images += len(labels)
            shown.update()
    *hits, images = ranks.total([*hits.tolist(), images])
    if images == 0:
        raise UsageError("the validation set is empty.")
    accuracy_at = [count / images for count in hits]
    return {
        "accuracy": accuracy_at[-1],
        "accuracy_at": accuracy_at,
        "firing_rate": recorder.rates(),
        "raster": {name: spikes.cpu() for name, spikes in recorder.raster.items()},
    }
