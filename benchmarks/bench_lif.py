"""The LIF neuron: forward, backward and both, against what else there is.

    pytest benchmarks/bench_lif.py                       all cases; on the GPU, where there is one
    pytest benchmarks/bench_lif.py -k "both and f32"     some of them

The floor is a read and a write of each neuron-step forward, two reads and a write backward.
"""

import math

import pytest
import torch

import measure
import peers

# Published settings of the neuron. NEURONS: [batch, C, H, W] of layers, and 2^24 neurons: 2^26 neuron-steps at T = 4.
OPTIONS = {"tau": 2.0, "decay_input": False, "v_threshold": 1.0, "v_reset": 0.0, "surrogate": "sigmoid"}
NEURONS = {
    "resnet18.layer1": (32, 64, 32, 32),
    "resnet18.layer2": (32, 128, 16, 16),
    "resnet18.layer3": (32, 256, 8, 8),
    "resnet18.layer4": (32, 512, 4, 4),
    "resnet19.layer1": (32, 128, 32, 32),
    "resnet19.layer3": (32, 512, 8, 8),
    "16M.neurons": (64, 256, 32, 32),
}
TRAFFIC = {"forward": 2, "backward": 3, "both": 5}  # numbers moved for each neuron-step
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
CONTESTANTS = peers.lif(measure.device(), OPTIONS)


def cases():
    """Neurons, T, dtype, layout and mode; not every product of them, but each value beside the first of the others."""
    for dtype in DTYPES:
        for mode in TRAFFIC:
            yield "resnet18.layer1", 4, dtype, "contiguous", mode
        yield "resnet18.layer1", 4, dtype, "channels_last", "both"
        for steps in (6, 10, 16):
            yield "resnet18.layer1", steps, dtype, "contiguous", "both"
        for neurons in list(NEURONS)[1:-1]:
            yield neurons, 4, dtype, "contiguous", "both"
        for mode in TRAFFIC:
            yield "16M.neurons", 4, dtype, "contiguous", mode


def rows(shape, steps, dtype, layout, seed):
    generator = torch.Generator(measure.device()).manual_seed(seed)
    x = torch.randn(steps * shape[0], *shape[1:], generator=generator, device=measure.device()).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x.unflatten(0, (steps, shape[0]))


def check(function, x, upstream, dtype):
    """No figure for what computes something else: a contestant's spikes and gradients against the float32 loop."""
    x, upstream = x[:, :1].detach(), upstream[:, :1]
    leaves = x.clone().requires_grad_(), x.float().requires_grad_()
    spikes, expected = function(leaves[0]), peers.loop(OPTIONS, leaves[1])
    differing = (spikes.float() != expected).double().mean().item()
    # Others keep a bfloat16 state, which moves potentials across the threshold.
    assert differing <= (0.02 if dtype == torch.bfloat16 else 1e-5)
    got = torch.autograd.grad(spikes, leaves[0], upstream)[0].float()
    right = torch.autograd.grad(expected, leaves[1], upstream.float())[0]
    assert (got - right).abs().mean() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * right.abs().mean() + 1e-6


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize(("neurons", "steps", "dtype", "layout", "mode"), list(cases()), ids=str)
def test_lif(contest, tiny, neurons, steps, dtype, layout, mode, contestant):
    shape = NEURONS[neurons]
    if tiny:
        shape = (2, *(min(size, 4) for size in shape[1:]))

    def prepare():
        x, upstream = (rows(shape, steps, DTYPES[dtype], layout, seed) for seed in (0, 1))
        return lambda name: step_of(CONTESTANTS[name], x, upstream, DTYPES[dtype], mode)

    tensor_bytes = steps * math.prod(shape) * DTYPES[dtype].itemsize
    group = f"lif {mode}, {neurons}, T {steps}, {dtype}, {layout}"
    contest(group, contestant, prepare, floor_bytes=TRAFFIC[mode] * tensor_bytes, tensor_bytes=tensor_bytes)


def step_of(function, x, upstream, dtype, mode):
    """What is timed of a contestant, after a check of what it computes."""
    check(function, x, upstream, dtype)
    if mode == "forward":
        return torch.no_grad()(lambda: function(x))
    leaf = x.detach().requires_grad_()
    if mode == "both":
        return lambda: torch.autograd.grad(function(leaf), leaf, upstream)
    spikes = function(leaf)
    return lambda: torch.autograd.grad(spikes, leaf, upstream, retain_graph=True)
