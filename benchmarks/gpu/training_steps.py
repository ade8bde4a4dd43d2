"""Full training steps as the trainers take them, launched piece by piece and as one CUDA graph.

python -m gpu.training_steps BACKEND PRECISION     ours: PRECISION is off (float32) or bf16
python -m gpu.training_steps floor PRECISION       the convolutions and linear layers of the step alone
python -m gpu.training_steps profile PRECISION     which kernels the GPU runs in a step of ours
"""

from __future__ import annotations

import sys

import torch

from gpu import clock, record
from seal_fast.models import folded
from seal_fast.train.step import AMP_DTYPES, GraphedStep, Step
from seal_fast.train.tasks import DistillTask, parameter_groups
from training import CASES, SGD, WEIGHT_DECAY, WEIGHTS, Problem, floor, make_student

CASE = "resnet18-cifar"


def problem_of(case: str) -> Problem:
    """The case's networks and a batch on the GPU; in a rehearsal, whose tensors lie on the CPU, a small batch."""
    chosen = CASES[case]._replace(batch={"cpu": 2}) if record.rehearsing() else CASES[case]
    return Problem(chosen, torch.device("cuda"))


def make(problem: Problem, kind: type[Step], backend: str, amp: str, packed: bool) -> Step:
    """The trainers' step of the problem's networks."""
    student = make_student(problem.case, problem.device, backend)
    student.load_state_dict(problem.weights)
    teacher = folded(problem.teacher).to(dtype=AMP_DTYPES[amp], memory_format=torch.channels_last)
    task = DistillTask(student, teacher, method="seal", temperature=3.0, backend=backend, **WEIGHTS)
    optimizer = torch.optim.SGD(parameter_groups(student, WEIGHT_DECAY, spiking=True), **SGD, fused=True)
    scaler = torch.amp.GradScaler(problem.device.type, enabled=False)
    return kind(task, optimizer, scaler, device=problem.device, amp=amp, packed=packed)


def ours(backend: str, amp: str) -> None:
    """With and without a graph, and with spikes kept as bits."""
    torch.backends.cudnn.benchmark = True
    problem = problem_of(CASE)
    for kind, packed in ((Step, False), (GraphedStep, False), (Step, True)):
        graph = kind is GraphedStep
        facts = {"contestant": f"ours {backend}", "precision": amp, "graph": graph, "packed": packed}
        with record.attempt(stage="steps", case=CASE, **facts) as entry:
            step = make(problem, kind, backend, amp, packed)
            run = lambda step=step: step(problem.inputs, problem.labels)
            losses = [run().loss.item() for _ in range(kind.WARM_UP + 2 if graph else 1)]
            entry["first_loss"], entry["last_loss"] = losses[0], losses[-1]
            torch.cuda.reset_peak_memory_stats()
            _note(entry, problem, run)


def profile(amp: str) -> None:
    """Which kernels a step of ours consists of."""
    torch.backends.cudnn.benchmark = True
    problem = problem_of(CASE)
    for backend in ("auto", "triton"):
        facts = {"contestant": f"ours {backend}", "precision": amp, "profiled": True}
        with record.attempt(stage="steps", case=CASE, **facts) as entry:
            step = make(problem, Step, backend, amp, packed=False)
            entry["step_kernels"] = clock.kernels(lambda step=step: step(problem.inputs, problem.labels), most=60)


def convolutions(amp: str) -> None:
    """The floor of a step: what no neuron, norm or loss can go below."""
    torch.backends.cudnn.benchmark = True
    with record.attempt(stage="steps", case=CASE, contestant="convolutions alone", precision=amp) as entry:
        problem = problem_of(CASE)
        _note(entry, problem, floor(problem, AMP_DTYPES[amp]))


def _note(entry: dict, problem: Problem, run) -> None:
    entry.update(clock.step(run), tf32=torch.backends.cudnn.allow_tf32)
    entry["images_s"] = len(problem.labels) / entry["ms"] * 1e3
    entry["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20


FIRST_ARGUMENTS = {
    "triton": ours,
    "cupy": ours,
    "floor": lambda _, amp: convolutions(amp),
    "profile": lambda _, amp: profile(amp),
}

if __name__ == "__main__":
    FIRST_ARGUMENTS[sys.argv[1]](*sys.argv[1:])
