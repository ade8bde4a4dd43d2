"""The same calls as SpikingJelly, torch.compile and torch's loops run them: each contestant in an attempt of its own.

python -m gpu.peers OPERATOR       lif or seal_loss
python -m gpu.peers training       full training steps but ours
"""

from __future__ import annotations

import sys

import torch

import peers
import training
from gpu import clock, record
from gpu.times import SHAPE
from gpu.training_steps import CASE, problem_of

OPTIONS = {"tau": 2.0, "decay_input": False, "v_threshold": 1.0, "v_reset": 0.0, "surrogate": "sigmoid"}


def lif() -> None:
    """Forward and backward."""
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for name, function in peers.lif(device, OPTIONS).items():
            facts = {"operator": "lif", "contestant": name, "dtype": str(dtype), "shape": SHAPE}
            with record.attempt(stage="peers", **facts) as entry:
                x, upstream = (torch.randn(SHAPE, device=device).to(dtype) for _ in range(2))
                leaf = x.requires_grad_()
                run = lambda function=function, leaf=leaf, upstream=upstream: torch.autograd.grad(
                    function(leaf), leaf, upstream
                )
                entry.update(clock.operator(run))


def seal_loss() -> None:
    """Loss and gradient."""
    device = torch.device("cuda")
    for shape in ((4, 128, 100), (4, 512, 1000)):
        for name, function in peers.seal_loss(device, training.WEIGHTS).items():
            facts = {"operator": "seal_loss", "contestant": name, "shape": shape}
            with record.attempt(stage="peers", **facts) as entry:
                logits = torch.randn(shape, device=device).requires_grad_()
                rest = torch.randn(shape[1:], device=device), torch.randint(shape[2], shape[1:2], device=device)
                run = lambda function=function, logits=logits, rest=rest: torch.autograd.grad(
                    function(logits, *rest), logits
                )
                entry.update(clock.operator(run))


def steps() -> None:
    """The published step, and its graph made fast around SpikingJelly's neurons; compiled last, which takes minutes."""
    torch.backends.cudnn.benchmark = True
    problem = problem_of(CASE)
    others = [name for name in training.CONTESTANTS if not name.startswith(("ours", "convolutions"))]
    for name in sorted(others, key=lambda name: "compile" in name):
        with record.attempt(stage="peers", operator="training", case=CASE, contestant=name) as entry:
            torch.cuda.reset_peak_memory_stats()
            step = training.CONTESTANTS[name][0](problem)
            entry["first_loss"] = step().item()
            entry.update(clock.step(step), note=step.note)
            entry["images_s"] = len(problem.labels) / entry["ms"] * 1e3
            entry["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20


FIRST_ARGUMENTS = {"lif": lif, "seal_loss": seal_loss, "training": steps}

if __name__ == "__main__":
    FIRST_ARGUMENTS[sys.argv[1]]()
