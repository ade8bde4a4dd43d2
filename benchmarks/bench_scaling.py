"""How the cost grows with T, batch, channels, classes and depth: forward with backward, ours and the published way.

    pytest benchmarks/bench_scaling.py

The table at the end gives the exponent p of time ~ size^p, fitted to the upper half of the sizes.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import figures
import measure
import peers
import published
import published_loss
import seal_fast
from seal_fast.models.snn import Block, Neuron

OPTIONS = {"tau": 2.0, "decay_input": False, "v_threshold": 1.0, "v_reset": 0.0, "surrogate": "sigmoid"}
WEIGHTS = {"alpha": 0.6, "beta": 0.15}
SECTION = (
    "growth; p of time ~ size^p over the upper half of the sizes (range, should each time lie anywhere in its own)"
)
PEER = next((name for name in peers.lif(measure.device(), OPTIONS) if name.startswith("SpikingJelly")), "torch loop")


def steps_of_lif(T: int = 4, B: int = 8, C: int = 64):
    """Neurons of [T, B, C, 16, 16]."""
    x = torch.randn(T, B, C, 16, 16, device=measure.device())
    contestants = peers.lif(measure.device(), OPTIONS)
    makers = {"ours": lambda: next(iter(contestants.values())), "peer": lambda: contestants[PEER]}
    return _forward_and_backward(x, makers)


def steps_of_loss(T: int = 4, B: int = 128, K: int = 100):
    """The loss of logits [T, B, K]."""
    device = measure.device()
    logits, teacher_logits = torch.randn(T, B, K, device=device) * 3, torch.randn(B, K, device=device) * 3
    labels = torch.randint(0, K, (B,), device=device)
    makers = {
        "ours": lambda: lambda z: seal_fast.seal_loss(z, teacher_logits, labels, **WEIGHTS).loss,
        "peer": lambda: lambda z: published_loss.seal_loss(z, teacher_logits, labels, **WEIGHTS),
    }
    return _forward_and_backward(logits, makers)


class Chain(nn.Module):
    """Residual blocks one after the other."""

    def __init__(self, blocks: list[nn.Module], *arguments):
        super().__init__()
        self.blocks, self.arguments = nn.ModuleList(blocks), arguments

    def forward(self, spikes):  # noqa: D102
        for block in self.blocks:
            spikes = block(spikes, *self.arguments)
        return spikes


def steps_of_network(T: int = 4, blocks: int = 2):
    """Blocks of two convolutions of 32 channels on 16x16, for T steps of 4 images."""
    device = measure.device()
    spikes = (torch.rand(T * 4, 32, 16, 16, device=device) < 0.2).float()
    neuron = functools.partial(Neuron, tau=2.0, decay_input=False)
    looped = functools.partial(published.LoopedLIF, 2.0, T)

    def ours():
        chain = Chain([Block(32, 32, 1, neuron) for _ in range(blocks)], T)
        return chain.to(device, memory_format=torch.channels_last)

    def peer():
        return Chain([published.Block(32, 32, 1, looped) for _ in range(blocks)]).to(device)

    return _forward_and_backward(spikes, {"ours": ours, "peer": peer})


def _forward_and_backward(x: torch.Tensor, makers: dict):
    leaf = x.requires_grad_()

    @functools.cache
    def function(name):
        return makers[name]()

    def step(name):
        output = function(name)(leaf)
        output = output if output.dim() == 0 else output.sum()
        return torch.autograd.grad(output, leaf)

    def kept(name):
        parameters = function(name).parameters() if isinstance(function(name), nn.Module) else ()
        return measure.kept_bytes(lambda: function(name)(leaf), parameters)

    return step, kept


# study -> (what makes its steps, the argument that varies, its sizes)
STUDIES = {
    "lif over T": (steps_of_lif, "T", (1, 2, 4, 8, 16, 32, 64)),
    "lif over B": (steps_of_lif, "B", (1, 2, 4, 8, 16, 32, 64)),
    "lif over C": (steps_of_lif, "C", (8, 16, 32, 64, 128, 256, 512)),
    "seal_loss over T": (steps_of_loss, "T", (2, 4, 8, 16, 32, 64)),
    "seal_loss over B": (steps_of_loss, "B", (16, 32, 64, 128, 256, 512, 1024)),
    "seal_loss over K": (steps_of_loss, "K", (10, 32, 100, 316, 1000, 3162, 10000)),
    "blocks over T": (steps_of_network, "T", (1, 2, 4, 8, 16)),
    "blocks over depth": (steps_of_network, "blocks", (1, 2, 4, 8, 16)),
}
CASES = [(study, size) for study, (_, _, sizes) in STUDIES.items() for size in sizes]


@pytest.fixture(scope="session")
def studied(report):
    """Study -> contestant -> size -> seconds; and at the end the table of their exponents."""
    found: dict[str, dict[str, dict[int, figures.Figure]]] = {}
    yield found
    for study, contestants in found.items():
        for contestant, times in contestants.items():
            if len(times) > 2:
                report(SECTION, study, f"  {contestant:28s} {figures.exponent(times).shown('6.2f')}")


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", ["ours", "peer"])
@pytest.mark.parametrize(("study", "size"), CASES, ids=lambda value: str(value).replace(" ", "-"))
def test_scaling(contest, benchmark, studied, tiny, study, size, contestant):
    make, argument, sizes = STUDIES[study]
    if tiny and size != sizes[0]:
        # All sizes of a study run the same code, and the larger ones take minutes together.
        pytest.skip("one size shows that the study runs")
    step, kept = make(**{argument: size})
    name = {"ours": "seal-fast", "peer": PEER if make is steps_of_lif else "published, eager"}[contestant]
    contest(
        f"{study}: {size}",
        contestant,
        lambda: lambda contestant: functools.partial(step, contestant),
        shown=name,
        study=study,
        size=size,
    )
    benchmark.extra_info["kept_bytes"] = kept(contestant)
    studied.setdefault(study, {}).setdefault(name, {})[size] = benchmark.extra_info["time"]
