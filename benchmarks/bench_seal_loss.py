"""The selective-alignment loss: forward, and forward with backward, against its published formulation.

    pytest benchmarks/bench_seal_loss.py

The floor is a read and a write of the logits.
"""

import pytest
import torch

import measure
import peers
import published_loss

SHAPES = {  # logits [T, B, K]
    "cifar100": (4, 128, 100),
    "imagenet": (4, 512, 1000),
    "cifar10": (4, 128, 10),
    "cifar10-dvs": (10, 32, 10),
    "32k-classes": (4, 16, 32768),
}
WEIGHTS = {"alpha": 0.6, "beta": 0.15}
CONTESTANTS = peers.seal_loss(measure.device(), WEIGHTS)


def inputs(shape):
    generator = torch.Generator(measure.device()).manual_seed(0)
    logits = torch.randn(shape, generator=generator, device=measure.device()) * 3
    teacher_logits = torch.randn(shape[1:], generator=generator, device=measure.device()) * 3
    labels = torch.randint(0, shape[2], shape[1:2], generator=generator, device=measure.device())
    return logits, teacher_logits, labels


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("mode", ["both", "forward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_seal_loss(contest, tiny, shape, mode, contestant):
    T, B, K = SHAPES[shape]
    if tiny:
        B, K = 2, min(K, 8)

    def prepare():
        logits, teacher_logits, labels = inputs((T, B, K))
        exact = published_loss.seal_loss(logits.double(), teacher_logits.double(), labels, **WEIGHTS).item()

        def step_of(name):
            function = CONTESTANTS[name]
            assert abs(function(logits, teacher_logits, labels).item() / exact - 1) < 1e-5
            if mode == "forward":
                return torch.no_grad()(lambda: function(logits, teacher_logits, labels))
            leaf = logits.detach().requires_grad_()
            return lambda: torch.autograd.grad(function(leaf, teacher_logits, labels), leaf)

        return step_of

    tensor_bytes = T * B * K * 4
    floor = tensor_bytes * (2 if mode == "both" else 1)
    contest(f"seal_loss {mode}, {shape} {[T, B, K]}", contestant, prepare, floor_bytes=floor, tensor_bytes=tensor_bytes)
