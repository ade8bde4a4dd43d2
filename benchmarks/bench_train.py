"""The distillation step (teacher, student, loss, backward, optimiser), against the published one and its own floor.

    pytest benchmarks/bench_train.py                                  all cases; on the GPU, where there is one
    pytest benchmarks/bench_train.py -k "resnet18-cifar and not compile"

Contestants of a case start from the same weights and run in turn, step by step. A floor is what the convolutions and
linear layers of the step need alone, channels_last and with the stem once for each image. On the CPU a fresh process
finds the peak memory, as this command does:

    python benchmarks/bench_train.py resnet18-cifar "published, eager"
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import figures
import measure
import seal_fast
from training import CASES, CONTESTANTS, FLOORS, Case, Problem, Step

SECTION = (
    "training step; images/s: median (range of all but the outer tenths); of 1st: speed, that of the first being 1; "
    "of floor: time, that of the convolutions alone being 1, both in the same rounds; MiB: peak of networks and step; "
    "B: kept for backward per neuron-step; %: of neurons that fire"
)
# Steps between two waits for the device.
STRETCH = {"cpu": 1, "cuda": 5}
# How far a contestant may lie from the published first loss, relatively: a few spikes differ after float32's rounding,
# more after bfloat16's. Measured on the CPU: up to 4e-3, and 4e-2.
LOSS = {torch.float32: 2e-2, torch.bfloat16: 1e-1}


def compete(
    case: Case, contestants: list[str], failed: dict, facts: dict, seconds: float, stretch: int
) -> dict[str, list[float]]:
    """Make steps, see that all compute the same, and time them in turn.

    Args:
        case: What they train.
        contestants: Their names.
        failed: Gets the `measure.Failure` of each that raises, which does not keep the others from being timed.
        facts: What is known of them, by contestant and quantity; is filled with what was missing, of full steps only:
            the note, bytes kept for backward per neuron-step and, on a GPU, bytes at the peak. The first one also gets
            the firing rate, which is that of all.
        seconds: For how long each is timed.
        stretch: Steps between two waits for the device.

    Returns:
        Contestant -> seconds of a step.
    """
    device = measure.device()
    torch.backends.cudnn.benchmark = True  # for every contestant alike
    problem = Problem(case, device)
    expected = first_loss(problem, contestants)
    with measure.noting({}, "firing rate"):
        facts.setdefault(contestants[0], {}).setdefault("firing_rate", problem.recorded.firing_rate)
    steps = {}
    for contestant in contestants:
        build, dtype = CONTESTANTS[contestant]
        known = facts.setdefault(contestant, {})
        with measure.noting(failed, contestant):
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            step = build(problem, **({"neurons": known["note"]} if known.get("note") else {}))
            loss = step()
            if isinstance(step, Step):
                assert abs(loss.item() / expected - 1) < LOSS[dtype], f"first loss {loss}, expected {expected}"
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    step()
                    known["peak_bytes"] = torch.cuda.max_memory_allocated() - before
                if "kept_bytes" not in known:
                    apart = [*step.student.parameters(), *step.student.buffers(), problem.inputs, problem.arranged]
                    known["kept_bytes"] = measure.kept_bytes(step.forward, apart) / problem.recorded.neuron_steps
                known["note"] = step.note
            steps[contestant] = step
    stretches = {name: lambda step=step: [step() for _ in range(stretch)] for name, step in steps.items()}
    for name, step in steps.items():
        with measure.noting(failed, name):
            step()  # in the first turn the system gives what memory the steps after each other need
    entrants = {name: run for name, run in stretches.items() if name not in failed}
    raced = measure.race(entrants, seconds, failed=failed)
    return {name: [seconds / stretch for seconds in times] for name, times in raced.items()}


def first_loss(problem: Problem, contestants: list[str]) -> float:
    """What the loss of each contestant has to be: the published one or, where that raises, the next contestant's."""
    for name in dict.fromkeys(("published, eager", *contestants)):
        with measure.noting({}, name):
            step = CONTESTANTS[name][0](problem)
            if isinstance(step, Step):
                return step.forward().item()
    return math.nan


def peak_bytes(name: str, contestant: str, note: str, *, tiny: bool = False) -> int | None:
    """By how much a fresh process grows when it makes the networks and runs two steps; None where that is unknown."""
    if measure.resident_bytes() is None:
        return None
    arguments = [name, contestant, note, *(["--tiny"] if tiny else [])]
    result = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the process that finds the peak memory ended with {result.returncode}:\n{result.stderr}")
    return int(result.stdout.split()[-1])


def main(name: str, contestant: str, note: str = "", *options: str) -> None:
    """Print the growth of this process in bytes; `note` is what a contestant that chooses had chosen."""
    seal_fast.reuse_freed_memory()  # as the trainers do, and for every contestant alike
    before = measure.resident_bytes()
    problem = Problem(CASES[name].tiny() if "--tiny" in options else CASES[name], torch.device("cpu"))
    step = CONTESTANTS[contestant][0](problem, **({"neurons": note} if note else {}))
    step(), step()
    print(measure.resident_bytes(peak=True) - before)


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("name", CASES)
def test_step(request, benchmark, report, timed, seconds, facts, tiny, name, contestant):
    device = measure.device().type
    case = CASES[name].tiny() if tiny else CASES[name]
    batch = case.batch[device]
    group = f"training step, {name}: {case.student} <- {case.teacher}, T {case.T}, "
    group += f"{batch} x {[case.channels, case.size, case.size]}"
    known = facts.setdefault(group, {})

    chosen = [item.callspec.params for item in request.session.items if item.originalname == "test_step"]
    contestants = [params["contestant"] for params in chosen if params["name"] == name]

    def race(entrants, failed):
        return compete(case, entrants, failed, known, seconds, 1 if tiny else STRETCH[device])

    benchmark.group = group
    benchmark.extra_info["contestant"] = contestant
    times = timed(SECTION, group, contestants, race, contestant)
    own = known[contestant]
    if device == "cpu" and not tiny and contestant not in FLOORS.values() and "peak_bytes" not in own:
        own["peak_bytes"] = peak_bytes(name, contestant, own["note"])
    floor = FLOORS[CONTESTANTS[contestant][1]]
    extra = benchmark.extra_info
    extra.update(
        note=own.get("note", ""),
        time_of_floor=figures.ratio(times[contestant], times[floor]) if floor in times.keys() - {contestant} else None,
        peak_bytes=own.get("peak_bytes"),
        kept_bytes_per_neuron_step=own.get("kept_bytes"),
        firing_rate=own.get("firing_rate"),
    )
    report(SECTION, group, line(batch, extra))


def line(batch: int, extra: dict) -> str:
    """A row of the printed table."""
    names = ("time_of_first", "time_of_floor", "peak_bytes", "kept_bytes_per_neuron_step", "firing_rate")
    of_first, of_floor, peak, kept, rate = (extra.get(name) for name in names)
    alone = "  1.00" if extra["contestant"] == extra["first"] else "     -"
    cells = [
        f"  {extra['contestant']:28s} {extra['time'].inverse().shown('8.1f', batch):26s}",
        f"{of_first.inverse().shown('6.2f') if of_first else alone:22s} of 1st",
        f"{of_floor.shown('6.2f'):22s} of floor" if of_floor else " " * 31,
        f"{peak / 2**20:8.0f} MiB" if peak else " " * 12,
        f"{kept:5.1f} B" if kept else " " * 7,
        f"{100 * rate:5.1f} %" if rate is not None else "",
        extra["note"],
    ]
    return " ".join(cells).rstrip()


if __name__ == "__main__":
    main(*sys.argv[1:])
