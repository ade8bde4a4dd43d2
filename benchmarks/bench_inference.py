"""The student's evaluation pass, against the published one and its own floor.

    pytest benchmarks/bench_inference.py                        all cases; on the GPU, where there is one
    pytest benchmarks/bench_inference.py -k resnet18-cifar

Contestants of a case have the same weights and running statistics, which are those of the batch, and run in turn. On
the CPU, convolutions of the first skip what did not fire where that is faster, and those within `dense_convolutions`
are torch's. A floor is what the convolutions and linear layers need alone, dense, channels_last and with the stem once
for each image, so that a network that skips zeros may be below its floor.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import pytest
import torch

import figures
import floors
import measure
import seal_fast
from training import CASES, FLOORS, Problem, counted, looped, make_student, published_student, settle

SECTION = (
    "inference; images/s: median (range of all but the outer tenths); of 1st: speed, that of the first being 1; "
    "of floor: time, that of the dense convolutions alone being 1, both in the same rounds; %: of neurons that fire"
)
F32, BF16 = torch.float32, torch.bfloat16
PUBLISHED = "published, eager"
# name -> (the precision of the convolutions, whether they are dense)
OURS = {
    "ours, float32": (F32, False),
    "ours, bfloat16": (BF16, False),
    "ours, float32, dense": (F32, True),
    "ours, bfloat16, dense": (BF16, True),
}
# How far logits may lie from the published ones in the mean, their deviation being 1. In float32 a few spikes differ
# after rounding: measured up to 0.03. Under autocast to bfloat16 the published logits themselves move, with random
# weights by up to 1.0; ours may be off by half as much again.
CLOSE = 0.1
STRETCH = {"cpu": 1, "cuda": 5}  # passes between two waits for the device


class Network:
    """What all contestants of a case share.

    Attributes:
        problem: Where the weights and the inputs come from.
        inputs: As the published network takes them.
        arranged: As the trainers' feed brings them.
        published: The published network, in evaluation mode.
        student: Ours.
        layers: Convolutions and linear layers of a pass with the stem once for each image.
        firing_rate: The mean over all neurons and steps.
        expected: The published logits [T, B, K].
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.inputs = problem.inputs.transpose(0, 1) if problem.case.events else problem.inputs
        self.arranged = problem.arranged
        self.published = settle(published_student(problem, looped(problem.case)), self.inputs)
        self.student = make_student(problem.case, problem.device).eval()
        self.student.load_state_dict(self.published.state_dict())
        once = published_student(problem, looped(problem.case), stem_once=True).eval()
        once.load_state_dict(self.published.state_dict())
        with counted(once) as spikes, torch.no_grad(), floors.recorded(once) as self.layers:
            self.expected = once(self.inputs)
        self.firing_rate = spikes.rate

    def step(self, contestant: str) -> Callable[[], object]:
        """What is timed of a contestant, after a first call, and a check of what it computes."""
        for dtype, name in FLOORS.items():
            if contestant == name:
                run = floors.convolutions(self.layers, dtype)
                run()
                return run
        dtype, run = F32, functools.partial(self.published, self.inputs)
        if contestant != PUBLISHED:
            dtype, dense = OURS[contestant]
            run = functools.partial(self._ours, dtype, dense)
        run = torch.inference_mode()(run)
        off, bound = self._off(run()), CLOSE + 1.5 * self.moved * (dtype == BF16)
        assert off <= bound, f"logits are off by {off:.3f} of their deviation, more than {bound:.3f}"
        return run

    def _off(self, logits: torch.Tensor) -> float:
        return ((logits.float() - self.expected).abs().mean() / self.expected.std()).item()

    @functools.cached_property
    def moved(self) -> float:
        """By how much the published logits are off when they are computed under autocast to bfloat16."""
        with torch.inference_mode(), torch.autocast(self.problem.device.type, dtype=BF16):
            return self._off(self.published(self.inputs))

    def _ours(self, dtype: torch.dtype, dense: bool) -> torch.Tensor:
        with (
            torch.autocast(self.problem.device.type, dtype=dtype, enabled=dtype != F32),
            seal_fast.dense_convolutions() if dense else contextlib.nullcontext(),
        ):
            return self.student(self.arranged)


def contestants(device: torch.device) -> list[str]:
    """Their names; only on the CPU is there a choice between convolutions."""
    names = [name for name, (_, dense) in OURS.items() if not dense or device.type == "cpu"]
    return [PUBLISHED, *names, *FLOORS.values()]


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", contestants(measure.device()))
@pytest.mark.parametrize("name", CASES)
def test_inference(benchmark, report, timed, seconds, facts, tiny, name, contestant):
    device = measure.device()
    case = CASES[name].tiny() if tiny else CASES[name]
    batch, stretch = case.batch[device.type], 1 if tiny else STRETCH[device.type]
    group = f"inference, {name}: {case.student}, T {case.T}, {batch} x {[case.channels, case.size, case.size]}"
    known = facts.setdefault(group, {})

    def race(entrants, failed):
        torch.backends.cudnn.benchmark = True  # for every contestant alike
        network, steps = Network(Problem(case, device)), {}
        known["firing_rate"] = network.firing_rate
        for entrant in entrants:
            with measure.noting(failed, entrant):
                step = network.step(entrant)
                steps[entrant] = lambda step=step: [step() for _ in range(stretch)]
        times = measure.race(steps, seconds, failed=failed)
        return {entrant: [each / stretch for each in of_entrant] for entrant, of_entrant in times.items()}

    benchmark.group = group
    extra = benchmark.extra_info
    extra["contestant"] = contestant
    times = timed(SECTION, group, contestants(device), race, contestant)
    dtype = OURS[contestant][0] if contestant in OURS else F32
    floor = FLOORS[dtype]
    if contestant not in FLOORS.values() and floor in times:
        extra["time_of_floor"] = figures.ratio(times[contestant], times[floor])
    if contestant == PUBLISHED:
        extra["firing_rate"] = known["firing_rate"]
    report(SECTION, group, line(batch, extra))


def line(batch: int, extra: dict) -> str:
    """A row of the printed table."""
    of_first, of_floor, rate = (extra.get(name) for name in ("time_of_first", "time_of_floor", "firing_rate"))
    alone = "  1.00" if extra["contestant"] == extra["first"] else "     -"
    cells = [
        f"  {extra['contestant']:28s} {extra['time'].inverse().shown('8.1f', batch):26s}",
        f"{of_first.inverse().shown('6.2f') if of_first else alone:22s} of 1st",
        f"{of_floor.shown('6.2f'):22s} of floor" if of_floor else " " * 31,
        f"{100 * rate:5.1f} %" if rate is not None else "",
    ]
    return " ".join(cells).rstrip()
