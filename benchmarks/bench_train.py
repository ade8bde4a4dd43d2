"""The distillation step (teacher, student, loss, backward, optimiser), against the published one and its own floor.

    pytest benchmarks/bench_train.py                                  all cases; on the GPU, where there is one
    pytest benchmarks/bench_train.py -k "resnet18-cifar and not compile"

Contestants of a case start from the same weights and run in turn, step by step. A floor is what the convolutions and
linear layers of the step need alone, channels_last and with the stem once for each image. On the CPU a fresh process
finds the peak memory, as this command does:

    python benchmarks/bench_train.py resnet18-cifar "published, eager"
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import measure
import seal_fast
from training import CASES, CONTESTANTS, FLOORS, Problem, Step

SECTION = (
    "training step, images/s: best (median) of all rounds; of 1st: speed, that of the first being 1; of floor: time, "
    "that of the convolutions alone being 1; MiB: peak of networks and step; B: kept for backward per neuron-step"
)
# Steps between two waits for the device.
STRETCH = {"cpu": 1, "cuda": 5}
# How far a contestant may lie from the published first loss, relatively: a few spikes differ after float32's rounding,
# more after bfloat16's. Measured on the CPU: up to 4e-3, and 4e-2.
LOSS = {torch.float32: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Figures:
    """What was measured of a full step beside its time."""

    note: str = ""
    kept_bytes: float | None = None  # per neuron-step
    peak_bytes: int | None = None


def make(name: str, contestants: list[str], *, tiny: bool) -> tuple[dict[str, Callable], dict[str, Figures]]:
    """Make the steps of a case, and see that all compute the same.

    Args:
        name: Of the case.
        contestants: Their names.
        tiny: Whether the smallest sizes do.

    Returns:
        Contestant -> a step, unless the GPU has too little memory; and figures, of full steps only.
    """
    device = measure.device()
    torch.backends.cudnn.benchmark = True  # for every contestant alike
    problem = Problem(CASES[name].tiny() if tiny else CASES[name], device)
    first_loss = CONTESTANTS["published, eager"][0](problem).forward().item()
    figures, steps = {}, {}
    for contestant in contestants:
        build, dtype = CONTESTANTS[contestant]
        try:
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            step = build(problem)
            loss = step()
            if isinstance(step, Step):
                assert abs(loss.item() / first_loss - 1) < LOSS[dtype], f"{contestant}: {loss}, published {first_loss}"
                apart = [*step.student.parameters(), *step.student.buffers(), problem.inputs]
                kept = measure.kept_bytes(step.forward, apart) / problem.recorded[1]
                figures[contestant] = Figures(step.note, kept)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    step()
                    figures[contestant].peak_bytes = torch.cuda.max_memory_allocated() - before
            steps[contestant] = step
        except torch.cuda.OutOfMemoryError:
            continue
    return steps, figures


def peak_bytes(name: str, contestant: str, note: str, *, tiny: bool = False) -> int | None:
    """By how much a fresh process grows when it makes the networks and runs two steps; None where that is unknown."""
    if measure.resident_bytes() is None:
        return None
    arguments = [name, contestant, note, *(["--tiny"] if tiny else [])]
    result = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def main(name: str, contestant: str, note: str = "", *options: str) -> None:
    """Print the growth of this process in bytes; `note` is what a contestant that chooses had chosen."""
    seal_fast.reuse_freed_memory()  # as the trainers do, and for every contestant alike
    before = measure.resident_bytes()
    problem = Problem(CASES[name].tiny() if "--tiny" in options else CASES[name], torch.device("cpu"))
    step = CONTESTANTS[contestant][0](problem, **({"neurons": note} if note else {}))
    step(), step()
    print(measure.resident_bytes(peak=True) - before)


@pytest.fixture(scope="session")
def made() -> dict[str, tuple[dict, dict]]:
    """What `make` made for each case; the steps until the last sweep."""
    return {}


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("name", CASES)
def test_step(request, benchmark, report, timed, sweep, made, tiny, name, contestant):
    device = measure.device().type
    case = CASES[name].tiny() if tiny else CASES[name]
    batch = case.batch[device]
    group = f"training step, {name}: {case.student} <- {case.teacher}, T {case.T}, "
    group += f"{batch} x {[case.channels, case.size, case.size]}"
    benchmark.group = group

    def race():
        if name not in made:
            chosen = [item.callspec.params for item in request.session.items if item.originalname == "test_step"]
            contestants = dict.fromkeys(params["contestant"] for params in chosen if params["name"] == name)
            made[name] = make(name, list(contestants), tiny=tiny)
        steps, stretch = made[name][0], 1 if tiny else STRETCH[device]
        stretches = {key: lambda step=step: [step() for _ in range(stretch)] for key, step in steps.items()}
        raced = measure.race(stretches, sweep.seconds, sweep.least)
        if sweep.last:
            steps.clear()  # and with them the memory that they hold
        return {key: [seconds / stretch for seconds in times] for key, times in raced.items()}

    times = timed(group, race, contestant)
    if times is None:
        return
    best, median = min(times[contestant]), statistics.median(times[contestant])
    figures = made[name][1].get(contestant, Figures())
    if device == "cpu" and not tiny and contestant not in FLOORS.values():
        figures.peak_bytes = peak_bytes(name, contestant, figures.note)
    floor = times.get(FLOORS[CONTESTANTS[contestant][1]])
    extra = {
        "contestant": contestant,
        "images_per_second": batch / best,
        "images_per_second_median": batch / median,
        "speed_of_first": min(next(iter(times.values()))) / best,
        "time_of_floor": best / min(floor) if floor else None,
        "peak_bytes": figures.peak_bytes,
        "kept_bytes_per_neuron_step": figures.kept_bytes,
        "note": figures.note,
    }
    benchmark.extra_info.update(extra)
    report(SECTION, group, line(extra))


def line(extra: dict) -> str:
    """A row of the printed table."""

    def shown(value, form, unit):
        return f"{value:{form}}{unit}" if value is not None else " " * (int(form.split(".")[0]) + len(unit))

    peak = extra["peak_bytes"]
    cells = [
        f"  {extra['contestant']:28s}{extra['images_per_second']:10.1f} ({extra['images_per_second_median']:10.1f})",
        shown(extra["speed_of_first"], "7.2f", " of 1st"),
        shown(extra["time_of_floor"], "7.2f", " of floor"),
        shown(None if peak is None else peak / 2**20, "8.0f", " MiB"),
        shown(extra["kept_bytes_per_neuron_step"], "6.1f", " B"),
        extra["note"],
    ]
    return " ".join(cells).rstrip()


if __name__ == "__main__":
    main(*sys.argv[1:])
