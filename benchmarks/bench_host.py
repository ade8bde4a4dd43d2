"""What a call costs the host: with next to no arithmetic, the time is that of Python, torch and launches.

    pytest benchmarks/bench_host.py

A training step of ResNet-18, eight channels wide, a layer of it and single operators, each against what the same takes
an ANN (batch norm and ReLU), SpikingJelly's neurons after torch's batch norm, or the eager formulation. On the CPU with
one thread. Beside the layer stands how many kernels of this library and operations of torch one call starts.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

import launches
import measure
import peers
import published
import published_loss
import seal_fast
import without_gpu
from seal_fast.models.snn import Neuron, ResNet

T, CHANNELS, CLASSES = 4, 8, 10
WEIGHTS = {"alpha": 0.6, "beta": 0.15}
LOSS = (T, 128, 100)  # logits of CIFAR-100


def spikingjelly(device: torch.device) -> dict:
    """Its neurons in float32 as a layer on rows [T·B, ...], made by a function, by the name of what is installed."""
    layers = peers.spikingjelly_layers(device, 2.0, T)
    return {name: make for name, make in layers.items() if " in " not in name and " with " not in name}


DEVICE = measure.device()
NEURONS = {"batch norm, ReLU": nn.ReLU, **spikingjelly(DEVICE)}
CONTESTANTS = [*NEURONS, "seal-fast"]
LAUNCHERS = ["batch norm, ReLU", "seal-fast cpu", "seal-fast triton", "seal-fast cupy"]
OPERATORS = {
    "lif": ["torch loop", "seal-fast"],
    "seal_loss": ["published, eager", "seal-fast reference", "seal-fast"],
    "packed_spikes": ["kept whole", "seal-fast"],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So that no time goes into waking another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step_of(contestant: str):
    """A training step of a narrow ResNet-18 on two images of 8 x 8."""
    torch.manual_seed(0)
    options = {"num_classes": CLASSES, "in_channels": 3, "time_steps": T}
    if contestant == "seal-fast":
        neuron = functools.partial(Neuron, tau=2.0, decay_input=False)
        network = ResNet((2, 2, 2, 2), (CHANNELS,) * 4, None, neuron=neuron, **options)
    else:
        network = published.Student("narrow_resnet18", neuron=NEURONS[contestant], stem_once=True, **options)
    network.to(DEVICE)
    images, teacher = torch.randn(2, 3, 8, 8).to(DEVICE), torch.randn(2, CLASSES).to(DEVICE)
    labels = torch.randint(CLASSES, (2,)).to(DEVICE)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        seal_fast.seal_loss(network(images), teacher, labels, **WEIGHTS).loss.backward()
        optimizer.step()

    return step


def layer_of(contestant: str, mode: str):
    """Batch norm and neurons of [T·B, C, 2, 2], B = 2: forward alone, with the backward pass, or in evaluation.

    A backend may follow "seal-fast".
    """
    torch.manual_seed(0)
    y = torch.randn(2 * T, CHANNELS, 2, 2).to(DEVICE).requires_grad_()
    bn, upstream = nn.BatchNorm2d(CHANNELS).to(DEVICE).train(mode != "evaluation"), torch.randn(y.shape).to(DEVICE)
    if contestant.startswith("seal-fast"):
        node = seal_fast.nn.LIFNode(decay_input=False, backend=contestant.removeprefix("seal-fast").strip() or "auto")
        run = functools.partial(seal_fast.bn_lif, bn=bn, lif=node, time_steps=T)
    else:
        neurons = NEURONS[contestant]()

        def run(y):
            return neurons(bn(y))

    if mode == "both":
        return lambda: torch.autograd.grad(run(y), (y, bn.weight, bn.bias), upstream)
    return (lambda: run(y)) if mode == "forward" else torch.no_grad()(lambda: run(y))


def operator_of(name: str, contestant: str):
    """One call of an operator."""
    torch.manual_seed(0)
    if name == "lif":
        x, options = torch.randn(T, 2, CHANNELS).to(DEVICE), {"tau": 2.0, "decay_input": True, "v_threshold": 1.0}
        if contestant == "torch loop":
            return torch.no_grad()(functools.partial(peers.loop, {**options, "surrogate": "sigmoid"}, x))
        return lambda: seal_fast.lif(x, **options)
    if name == "seal_loss":
        logits, teacher = torch.randn(LOSS).to(DEVICE).requires_grad_(), torch.randn(LOSS[1:]).to(DEVICE)
        labels = torch.randint(LOSS[-1], LOSS[1:2]).to(DEVICE)
        backend = "torch" if contestant == "seal-fast reference" else "auto"

        def run():
            if contestant == "published, eager":
                loss = published_loss.seal_loss(logits, teacher, labels, **WEIGHTS)
            else:
                loss = seal_fast.seal_loss(logits, teacher, labels, backend=backend, **WEIGHTS).loss
            return torch.autograd.grad(loss, logits)

        return run
    x, convolution = torch.randn(T, 2, CHANNELS, 8, 8).to(DEVICE), nn.Conv2d(CHANNELS, CHANNELS, 3).to(DEVICE)

    def kept():
        return torch.autograd.grad(convolution(seal_fast.lif(x)[0].flatten(0, 1)).sum(), convolution.weight)

    def packed():
        with seal_fast.packed_spikes():
            out = convolution(seal_fast.lif(x)[0].flatten(0, 1)).sum()
        return torch.autograd.grad(out, convolution.weight)

    return kept if contestant == "kept whole" else packed


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_host_of_a_step(contest, contestant):
    group = f"host, training step of ResNet-18, {CHANNELS} channels, T {T}, 2 x [3, 8, 8]"
    contest(group, contestant, lambda: step_of)


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("mode", ["forward", "both", "evaluation"])
def test_host_of_a_layer(contest, mode, contestant):
    run = layer_of(contestant, mode)
    run()
    counts = launches.counted(run)
    contest(
        f"host, batch norm and neurons, {mode}, [{2 * T}, {CHANNELS}, 2, 2]",
        contestant,
        lambda: functools.partial(layer_of, mode=mode),
        note=str(counts),
        kernels=len(counts.kernels),
        torch_operations=len(counts.operations),
    )


@pytest.fixture
def without_launches():
    """Launchers of GPU kernels take CPU tensors, and start nothing."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with without_gpu.without_launches():
        yield


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the GPU's own launches are timed above")
@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", LAUNCHERS)
@pytest.mark.parametrize("mode", ["forward", "both", "evaluation"])
@pytest.mark.usefixtures("without_launches")
def test_host_of_launchers(contest, mode, contestant):
    group = f"host, batch norm and neurons without the launches, {mode}, [{2 * T}, {CHANNELS}, 2, 2]"
    contest(group, contestant, lambda: functools.partial(layer_of, mode=mode))


@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize(
    ("operator", "contestant"),
    [*itertools.chain(*([(name, each) for each in contestants] for name, contestants in OPERATORS.items()))],
)
def test_host_of_an_operator(contest, operator, contestant):
    contest(f"host, {operator}", contestant, lambda: functools.partial(operator_of, operator))
