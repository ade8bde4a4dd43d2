"""What ranks send each other in a training step: counted where it leaves, and timed."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import processes
from seal_fast.kernels.bn_lif import ranks as statistics
from seal_fast.models import student
from seal_fast.train import ranks
from seal_fast.train.step import Step
from seal_fast.train.tasks import DistillTask

CPU = torch.device("cpu")


class Counted:
    """torch.distributed as batch norm sees it, with its messages counted: bytes that this rank puts in, and calls."""

    def __init__(self):
        self.counts = Counter()
        self.seconds = 0.0

    def __getattr__(self, name):
        return getattr(dist, name)

    def all_reduce(self, tensor, *args, **kwargs):
        self._timed("all_reduce", tensor, lambda: dist.all_reduce(tensor, *args, **kwargs))

    def all_gather(self, into, tensor, *args, **kwargs):
        self._timed("all_gather", tensor, lambda: dist.all_gather(into, tensor, *args, **kwargs))

    def _timed(self, name, tensor, call):
        start = time.perf_counter()
        call()
        self.seconds += time.perf_counter() - start
        self.counts[f"{name} calls"] += 1
        self.counts[f"{name} bytes"] += tensor.numel() * tensor.itemsize


def count(arch: str, shape: tuple, classes: int, time_steps: int, steps: int, path: Path) -> None:
    """Train for a few steps; the first rank writes what a step sent, and after more than two the least times.

    Gradients come in their final buckets from the second step on.
    """
    torch.manual_seed(0)
    network = student(arch, num_classes=classes, in_channels=shape[1], time_steps=time_steps)
    task = DistillTask(network, None, method="ce", alpha=0, beta=0, temperature=3.0, backend="auto")
    task.parallel = ranks.parallel(network)
    counted, gradient = Counted(), Counter()
    if ranks.size() > 1:

        def hook(state, bucket):
            gradient["calls"] += 1
            gradient["bytes"] += bucket.buffer().numel() * bucket.buffer().itemsize
            return allreduce_hook(state, bucket)

        task.parallel.register_comm_hook(None, hook)
        statistics.dist = counted
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)
    step = Step(task, optimizer, torch.amp.GradScaler("cpu", enabled=False), device=CPU, amp="off")
    inputs, labels = torch.randn(shape), torch.randint(classes, (shape[0],))
    seconds, of_statistics = [], []
    for _ in range(steps):
        before, start = counted.seconds, time.perf_counter()
        gradient.clear(), counted.counts.clear()
        step(inputs, labels)
        seconds.append(time.perf_counter() - start)
        of_statistics.append(counted.seconds - before)
    result = {"gradient": dict(gradient), "statistics": dict(counted.counts), "seconds": min(seconds)}
    result |= {"statistics seconds": min(of_statistics)}
    if steps > 2:
        result |= {"gradient alone": _all_reduce(gradient["bytes"]), "message alone": _all_reduce(1024, times=200)}
    if ranks.first():
        torch.save(result, path)


def _all_reduce(size: int, times: int = 10) -> float:
    """Least seconds of the sum of so many bytes over the ranks, alone."""
    if ranks.size() == 1:
        return 0.0
    buffer, seconds = torch.zeros(size // 4), []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(buffer)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Print what two processes of one thread show: python tests/support/traffic.py."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "traffic.pt")
    for arch, shape, classes, time_steps in (
        ("resnet8", (32, 1, 8, 8), 10, 4),
        ("preact_resnet34", (4, 3, 64, 64), 1000, 4),
    ):
        for size in (1, 2):
            processes.in_ranks(count, size, arch, shape, classes, time_steps, 20, path)
            print(arch, f"{size} rank(s) with {shape[0]} images each:", torch.load(path, weights_only=True), flush=True)


if __name__ == "__main__":
    main()
