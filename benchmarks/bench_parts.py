"""What a training step spends its time on: convolutions, teacher, loss, waiting for data, and the rest.

    pytest benchmarks/bench_parts.py

The rest is batch norm, neurons, residual sums, pooling and the optimiser: the step less its other parts, each of which
is timed alone, in turn with the step.
"""

from __future__ import annotations

import os
import statistics

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import floors
import measure
import published_loss
import seal_fast
from seal_fast.train.data.cifar import CifarImages
from seal_fast.train.data.transforms import image_transforms
from seal_fast.train.feed import Feed
from training import CASES, CONTESTANTS, WEIGHTS, Problem, Step

CASE = "resnet18-cifar"
CHOSEN = ("published, eager", "ours, float32", "ours, bfloat16")
PARTS = ("convolutions", "teacher", "loss")
SECTION = "parts of a training step, ms: medians, and the rest (batch norm, neurons, sums, optimiser)"


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
        "convolutions": floors.convolutions(layers, dtype, layout),
        "teacher": lambda: taught(step.teacher, seen[0], dtype),
        "loss": lambda: torch.autograd.grad(loss_of(logits, teacher_logits, problem.labels, **WEIGHTS), logits),
    }


@torch.no_grad()
def taught(teacher: torch.nn.Module, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The teacher's logits, computed as in the step."""
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return teacher(inputs)


def data_wait(problem: Problem, step: Step, steps: int) -> float:
    """Seconds a step that the loader lets wait while the published augmentation makes its batches."""
    images = np.random.default_rng(0).integers(0, 256, (problem.labels.numel() * (steps + 1), 32, 32, 3), np.uint8)
    transforms = image_transforms("CIFAR10", role="student")
    dataset = CifarImages(images, np.zeros(len(images), np.int64), transforms.train)
    workers = min(8, os.cpu_count() or 1)
    loader = DataLoader(dataset, problem.labels.numel(), num_workers=workers, pin_memory=problem.device.type == "cuda")
    feed = Feed(loader, problem.device, transforms.finish_train)
    waited = 0.0
    for number, _ in enumerate(feed):
        if number == 0:
            waited = feed.waited  # the workers have started
        measure.synchronised(step)()
    return (feed.waited - waited) / steps


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", CHOSEN)
def test_parts(benchmark, report, timed, effort, facts, tiny, contestant):
    group = f"parts of a training step, {CASE}"
    key = f"{group}, {contestant}"

    def race():
        torch.backends.cudnn.benchmark = True  # for every contestant alike
        problem = Problem(CASES[CASE].tiny() if tiny else CASES[CASE], measure.device())
        parts = parts_of(problem, CONTESTANTS[contestant][0](problem), contestant)
        for name in PARTS:
            measure.synchronised(parts[name])()
        if key not in facts:
            facts[key] = data_wait(problem, parts["step"], 1 if tiny else 2)
        return measure.race(parts, *effort)

    benchmark.group = group
    times = timed(key, race, "step")
    medians = {name: statistics.median(values) for name, values in times.items()}
    rest = medians["step"] - sum(medians[name] for name in PARTS)
    shown = {**{name: medians[name] for name in PARTS}, "rest": rest, "data wait": facts[key]}
    low, high = measure.spread(times["step"])
    parts = {f"{name.replace(' ', '_')}_seconds": seconds for name, seconds in shown.items()}
    benchmark.extra_info.update(contestant=contestant, low=low, high=high, **parts)
    cells = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in shown.items())
    report(SECTION, benchmark.group, f"  {contestant:28s} {1e3 * medians['step']:9.1f} = {cells}")
