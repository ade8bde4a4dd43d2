"""Full training steps as the trainers take them, launched piece by piece and as one CUDA graph, and what bounds them.

python -m gpu.training_steps VARIANTS      bf16, packed (bf16, spikes as bits) or off (float32)
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch

from gpu import clock, record
from seal_fast.models import folded
from seal_fast.train.step import AMP_DTYPES, GraphedStep, Step, free_workspaces
from seal_fast.train.tasks import DistillTask, parameter_groups
from training import CASES, SGD, WEIGHT_DECAY, WEIGHTS, Problem, floor, make_student

CASE = "resnet18-cifar"
LOSSES = 3  # steps after the warm-up whose losses are noted


class Variant(NamedTuple):
    """How a step is taken.

    Attributes:
        backend: Kernels.
        graph: Whether as one CUDA graph.
        packed: Whether spikes are kept as bits.
        overlap: Whether the teacher is a branch of the graph.
    """

    backend: str = "auto"
    graph: bool = True
    packed: bool = False
    overlap: bool = True


# What a process runs -> its precision and variants, in the order of what is wanted first. Only the first one's peak of
# memory is its own: later ones find what earlier ones left behind.
VARIANTS = {
    "bf16": ("bf16", [Variant(), Variant(overlap=False), Variant("cupy"), Variant(graph=False, overlap=False)]),
    "packed": ("bf16", [Variant(packed=True), Variant(graph=False, packed=True, overlap=False)]),
    "off": ("off", [Variant(), Variant(overlap=False)]),
}


def problem_of(case: str) -> Problem:
    """The case's networks and a batch on the GPU; in a rehearsal, whose tensors lie on the CPU, a small batch."""
    chosen = CASES[case]._replace(batch={"cpu": 2}) if record.rehearsing() else CASES[case]
    return Problem(chosen, torch.device("cuda"))


def make(problem: Problem, amp: str, variant: Variant) -> Step:
    """The trainers' step of the problem's networks."""
    backend, graph, packed, overlap = variant
    student = make_student(problem.case, problem.device, backend)
    student.load_state_dict(problem.weights)
    teacher = folded(problem.teacher).to(dtype=AMP_DTYPES[amp], memory_format=torch.channels_last)
    task = DistillTask(student, teacher, method="seal", temperature=3.0, backend=backend, **WEIGHTS)
    optimizer = torch.optim.SGD(parameter_groups(student, WEIGHT_DECAY, spiking=True), **SGD, fused=True)
    scaler = torch.amp.GradScaler(problem.device.type, enabled=False)
    options = {"device": problem.device, "amp": amp, "packed": packed}
    if not graph:
        return Step(task, optimizer, scaler, **options)
    return GraphedStep(task, optimizer, scaler, batch_size=len(problem.labels), overlap=overlap, **options)


def ours(problem: Problem, amp: str, variant: Variant) -> None:
    """Losses of the first steps, on a batch and its mirror image in turn; then times on the batch."""
    backend, *flags = variant
    facts = {"contestant": f"ours {backend}", "precision": amp, **dict(zip(Variant._fields[1:], flags, strict=True))}
    with record.attempt(stage="steps", case=CASE, **facts) as entry:
        _workspaces()  # those of the streams of variants before
        clock.forget()
        entry["before_MiB"] = torch.cuda.memory_allocated() / 2**20  # the problem, and what variants before left behind
        step = make(problem, amp, variant)
        batches = problem.arranged, problem.arranged.flip(-1)
        losses = []
        for i in range(GraphedStep.WARM_UP + LOSSES):
            if i == GraphedStep.WARM_UP:  # until then libraries try what is fastest, and take memory for it
                clock.forget()
            losses.append(step(batches[i % 2], problem.labels).loss.item())
        entry["losses"] = losses
        run = lambda: step(problem.arranged, problem.labels)
        _note(entry, problem, run)
        entry["step_MiB"] = entry["peak_MiB"] - entry["before_MiB"]
        if not variant.graph:
            _account(entry, step, run)
        if not variant.packed and not record.rehearsing():
            entry["step_kernels"] = clock.kernels(run, calls=3)
        entry["workspaces_MiB"] = _workspaces()


def convolutions(problem: Problem, amp: str) -> None:
    """The floor of a step, what no neuron, norm or loss can go below: as a graph, and launched one by one."""
    run = floor(problem, AMP_DTYPES[amp])
    for graph in (True, False):
        facts = {"contestant": "convolutions alone", "precision": amp, "graph": graph}
        with record.attempt(stage="steps", case=CASE, **facts) as entry:
            clock.forget()
            replay = clock.captured(run) if graph else run
            _note(entry, problem, replay)
            entry["step_kernels"] = [] if record.rehearsing() else clock.kernels(replay, calls=3)


def _note(entry: dict, problem: Problem, run) -> None:
    entry.update(clock.step(run, 0.5), tf32=torch.backends.cudnn.allow_tf32)
    entry["images_s"] = len(problem.labels) / entry["ms"] * 1e3
    entry["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20


def _workspaces() -> float:
    """MiB that cuBLAS kept for the threads and streams that it has met, now freed; no graph may need them again."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    free_workspaces()
    return (before - torch.cuda.memory_allocated()) / 2**20


def _account(entry: dict, step: Step, run) -> None:
    """MiB allocated at the end of each part of a step, and the most within it; and what is reserved after all.

    The parts: the teacher's forward pass; the student's, and the loss; the backward pass; the update.
    """
    MiB = 2**20

    def note(part: str) -> None:
        entry[f"after_{part}_MiB"] = torch.cuda.memory_allocated() / MiB
        entry[f"peak_{part}_MiB"] = torch.cuda.max_memory_allocated() / MiB
        torch.cuda.reset_peak_memory_stats()

    task = step.task

    def watched(inputs, labels):
        outcome = task(inputs, labels)
        note("forward")
        return outcome

    hooks = [
        task.teacher.register_forward_hook(lambda *_: note("teacher")),
        step.optimizer.register_step_pre_hook(lambda *_: note("backward")),
    ]
    step.task = watched
    step.optimizer.zero_grad(set_to_none=True)
    clock.forget()
    note("rest")
    run()
    note("update")
    entry["reserved_MiB"] = torch.cuda.memory_reserved() / MiB
    step.task = task
    for hook in hooks:
        hook.remove()


def main(name: str) -> None:
    """Ours, then the floor."""
    torch.backends.cudnn.benchmark = True
    problem = problem_of(CASE)
    amp, variants = VARIANTS[name]
    for variant in variants:
        ours(problem, amp, variant)
    if not any(variant.packed for variant in variants):
        convolutions(problem, amp)


FIRST_ARGUMENTS = VARIANTS

if __name__ == "__main__":
    with record.alone():
        main(sys.argv[1])
