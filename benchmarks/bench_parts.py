"""What a training step spends its time on: convolutions, teacher, loss, waiting for data, and the rest.

    pytest benchmarks/bench_parts.py

The rest is batch norm, neurons, residual sums, pooling and the optimiser: the step less its other parts, each of which
is timed alone, in turn with the step. Convolutions get random numbers, or bits that fire as often as in the step.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import figures
import floors
import measure
import published_loss
import seal_fast
from seal_fast.train.data.in_memory import ImagesInMemory
from seal_fast.train.data.transforms import image_transforms
from seal_fast.train.feed import Feed
from training import CASES, CONTESTANTS, WEIGHTS, Problem, Step

CASE = "resnet18-cifar"
CHOSEN = ("published, eager", "ours, float32", "ours, bfloat16")
PARTS = ("convolutions", "teacher", "loss")
SECTION = "parts of a training step; ms: medians (ranges); rest: batch norm, neurons, sums, optimiser"


def parts_of(problem: Problem, step: Step, name: str) -> dict:
    """The step, and its parts alone: name -> callable."""
    dtype = CONTESTANTS[name][1]
    seen = []
    handle = step.teacher.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with floors.recorded(step.student) as layers:
        step()
    handle.remove()
    published = name.startswith("published")
    layout = torch.contiguous_format if published else torch.channels_last
    loss_of = (
        published_loss.seal_loss
        if published
        else lambda *tensors, **weights: seal_fast.seal_loss(*tensors, **weights).loss
    )
    case, batch = problem.case, len(problem.labels)
    logits = torch.randn(case.T, batch, case.num_classes, device=problem.device, requires_grad=True)
    teacher_logits = torch.randn(batch, case.num_classes, device=problem.device)
    return {
        "step": step,
        "convolutions": floors.convolutions(layers, dtype, layout, skipping=True),
        "teacher": lambda: taught(step.teacher, seen[0], dtype),
        "loss": lambda: torch.autograd.grad(loss_of(logits, teacher_logits, problem.labels, **WEIGHTS), logits),
    }


@torch.no_grad()
def taught(teacher: torch.nn.Module, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The teacher's logits, computed as in the step."""
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return teacher(inputs)


def data_waits(problem: Problem, step: Step, steps: int) -> list[float]:
    """Seconds that the loader lets each of so many steps wait while the published augmentation makes its batches."""
    images = np.random.default_rng(0).integers(0, 256, (problem.labels.numel() * (steps + 1), 32, 32, 3), np.uint8)
    transforms = image_transforms("CIFAR10", role="student")
    dataset = ImagesInMemory(images, np.zeros(len(images), np.int64), transforms.train)
    workers = min(8, os.cpu_count() or 1)
    loader = DataLoader(dataset, problem.labels.numel(), num_workers=workers, pin_memory=problem.device.type == "cuda")
    feed = Feed(loader, problem.device, transforms.finish_train, torch.channels_last)
    waited = []
    for _ in feed:
        waited.append(feed.waited)
        measure.synchronised(step)()
    # In the first of them the workers start.
    return [after - before for before, after in itertools.pairwise(waited)]


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", CHOSEN)
def test_parts(benchmark, report, timed, seconds, facts, tiny, contestant):
    group = f"parts of a training step, {CASE}"
    key = f"{group}, {contestant}"

    def race(entrants, failed):
        torch.backends.cudnn.benchmark = True  # for every contestant alike
        problem = Problem(CASES[CASE].tiny() if tiny else CASES[CASE], measure.device())
        parts = parts_of(problem, CONTESTANTS[contestant][0](problem), contestant)
        for name in PARTS:
            with measure.noting(failed, name):
                measure.synchronised(parts[name])()
        waits = data_waits(problem, parts["step"], 1 if tiny else 2)
        times = measure.race({name: parts[name] for name in entrants if name not in failed}, seconds, failed=failed)
        facts.setdefault(key, []).extend(waits)
        return times

    benchmark.group = group
    benchmark.extra_info["contestant"] = contestant
    times = timed(SECTION, group, ["step", *PARTS], race, "step", key=key, shown=contestant, alone=False)
    parts = [times[name] for name in PARTS]
    rest = [step - sum(others) for step, *others in zip(times["step"], *parts, strict=True)]
    rounds = {**dict(zip(PARTS, parts, strict=True)), "rest": rest, "data wait": facts[key]}
    shown = {name: figures.figure(values) for name, values in rounds.items()}
    noted = {f"{name.replace(' ', '_')}_seconds": value for name, value in shown.items()}
    benchmark.extra_info.update(noted)
    cells = ", ".join(f"{name} {value.shown('.1f', 1e3)}" for name, value in shown.items())
    report(SECTION, group, f"  {contestant:28s} {benchmark.extra_info['time'].shown('8.1f', 1e3)} = {cells}")
