"""The same calls as SpikingJelly, torch.compile and torch's loops run them: each contestant in an attempt of its own.

python -m gpu.peers OPERATOR [compiled]       lif, bn_lif, seal_loss or training (full training steps but ours)

With `compiled`, those that torch.compile makes, which take minutes; without, all others.
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
F32, BF16 = torch.float32, torch.bfloat16
SECONDS = 0.1  # for each figure
DEVICE = torch.device("cuda")


def lif(chosen) -> None:
    """Forward and backward."""
    for dtype in (F32, BF16):
        for name, function in chosen(peers.lif(DEVICE, OPTIONS)):
            facts = {"operator": "lif", "contestant": name, "dtype": str(dtype), "shape": SHAPE}
            with record.attempt(stage="peers", **facts) as entry:
                x, upstream = (torch.randn(SHAPE, device=DEVICE).to(dtype) for _ in range(2))
                _note(entry, function, x.requires_grad_(), upstream)


def bn_lif(chosen) -> None:
    """Batch norm and the neurons: torch's batch norm in training with each kind of neuron, and ours as one layer."""
    T, B, *image = SHAPE
    for dtype in (F32, BF16):
        for layout in (torch.channels_last, torch.contiguous_format):
            for name, function in chosen(peers.bn_lif(DEVICE, OPTIONS, image[0], T)):
                facts = {"contestant": name, "dtype": str(dtype), "layout": str(layout)}
                with record.attempt(stage="peers", operator="bn_lif", **facts) as entry:
                    y, upstream = (
                        torch.randn(T * B, *image, device=DEVICE).to(dtype, memory_format=layout) for _ in range(2)
                    )
                    _note(entry, function, y.requires_grad_(), upstream)


def _note(entry, function, leaf, upstream) -> None:
    run = lambda: torch.autograd.grad(function(leaf), leaf, upstream)
    entry.update(clock.operator(run, SECONDS), wall_ms=clock.step(run, SECONDS)["ms"])


def seal_loss(chosen) -> None:
    """Loss and gradient."""
    for shape in ((4, 128, 100), (4, 512, 1000)):
        for name, function in chosen(peers.seal_loss(DEVICE, training.WEIGHTS)):
            facts = {"operator": "seal_loss", "contestant": name, "shape": shape}
            with record.attempt(stage="peers", **facts) as entry:
                logits = torch.randn(shape, device=DEVICE).requires_grad_()
                rest = torch.randn(shape[1:], device=DEVICE), torch.randint(shape[2], shape[1:2], device=DEVICE)
                run = lambda function=function, logits=logits, rest=rest: torch.autograd.grad(
                    function(logits, *rest), logits
                )
                entry.update(clock.operator(run, SECONDS), wall_ms=clock.step(run, SECONDS)["ms"])


def steps(chosen) -> None:
    """The published step, and its networks made fast around SpikingJelly's neurons.

    Launched one by one: neither can be captured in a CUDA graph, as the published loss waits for the GPU.
    """
    torch.backends.cudnn.benchmark = True
    problem = problem_of(CASE)
    for name, (make, _) in chosen(training.CONTESTANTS):
        if name.startswith(("ours", "convolutions")):
            continue
        with record.attempt(stage="peers", operator="training", case=CASE, contestant=name) as entry:
            step = make(problem)
            entry.update(first_loss=step().item(), note=step.note)
            clock.forget()
            entry.update(clock.step(step))
            entry["images_s"] = len(problem.labels) / entry["ms"] * 1e3
            entry["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20


FIRST_ARGUMENTS = {"lif": lif, "bn_lif": bn_lif, "seal_loss": seal_loss, "training": steps}


def main(operator: str, which: str = "eager") -> None:
    """Time the contestants of an operator."""
    compiled = which == "compiled"
    FIRST_ARGUMENTS[operator](lambda found: [item for item in found.items() if ("compile" in item[0]) == compiled])


if __name__ == "__main__":
    with record.alone():
        main(*sys.argv[1:])
