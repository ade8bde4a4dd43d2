"""What the benchmark of the training step measures with: its floor, bytes kept for backward, peak memory, turns."""

import math
import time

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import bench_inference
import bench_spike_conv
import bench_train
import floors
import measure
import published
import seal_fast
from figures import Figure
from seal_fast.kernels.packing.reference import pack
from seal_fast.ops import spike_conv
from seal_fast.ops._spike_tensor import SpikeTensor
from training import CASES, CONTESTANTS, FLOORS, Problem

CPU = torch.device("cpu")


def operations(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", ["resnet18-cifar", "resnet18-dvs", "preact34-imagenet"])
def test_floor_computes_the_convolutions_of_the_step(case):
    problem = Problem(CASES[case].tiny(), CPU)
    ours = operations(CONTESTANTS["ours, float32"][0](problem))
    assert operations(CONTESTANTS[FLOORS[torch.float32]][0](problem)) == ours
    assert operations(CONTESTANTS[FLOORS[torch.bfloat16]][0](problem)) == ours


def test_recorded_layers():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with floors.recorded(network) as layers:
        network(torch.randn(5, 3, 4, 4))
        with torch.no_grad():
            network(torch.randn(5, 3, 4, 4))
    network(torch.randn(5, 3, 4, 4))
    expected = [(0, (5, 3, 4, 4), True, False), (2, (5, 16), True, True)]
    expected += [(index, shape, False, False) for index, shape, *_ in expected]
    assert layers == [(network[index], shape, *flags, None) for index, shape, *flags in expected]


def test_kept_bytes_counts_each_storage_once_and_what_hooks_put_in_its_place():
    x, w = torch.randn(1000, requires_grad=True), torch.randn(1000, requires_grad=True)

    def forward():
        y = x.exp()  # keeps y
        z = y * w  # keeps y again, and w
        return (z * z).sum()  # keeps z

    class Handle:
        def __init__(self, tensor):
            self.parts = [torch.zeros(len(tensor) // 8, dtype=torch.uint8)]

    def packed():
        with saved_tensors_hooks(Handle, lambda handle: None):
            y = x.exp()
        return y.sin()  # keeps y itself

    assert measure.kept_bytes(forward, [w]) == 2 * 4000
    assert measure.kept_bytes(forward, []) == 3 * 4000
    assert measure.kept_bytes(packed, []) == 125 + 4000
    with saved_tensors_hooks(Handle, lambda handle: None):
        y = x.exp()
    assert y.grad_fn is not None  # and the hooks work as before


def bits_of(size):
    """Random spikes that are held as bits."""
    spikes = (torch.rand(size) < 0.2).float()
    return SpikeTensor.of(pack(spikes.view(1, -1)), spikes.shape, spikes.stride(), spikes.dtype)


def test_kept_bytes_counts_the_bits_of_spikes():
    spikes, convolution = bits_of((2, 64, 16, 16)), nn.Conv2d(64, 8, 3)
    parameters = [*convolution.parameters()]
    assert measure.kept_bytes(lambda: convolution(spikes), parameters) == spikes.numel() // 8
    with seal_fast.packed_spikes():
        assert measure.kept_bytes(lambda: convolution(spikes), parameters) == spikes.numel() // 8
    spikes.numbers(lasting=True)
    assert measure.kept_bytes(lambda: convolution(spikes), parameters) == spikes.numel() * 4


def test_layers_that_get_bits_are_recorded():
    spikes, network = bits_of((2, 64, 16, 16)), nn.Sequential(nn.Conv2d(64, 8, 16), nn.Flatten(), nn.Linear(8, 2))
    with floors.recorded(network) as layers:
        network(spikes)
        with torch.inference_mode():
            network(spikes)
    assert [layer.shape for layer in layers] == [(2, 64, 16, 16), (2, 8)] * 2
    assert [layer[2:4] for layer in layers] == [(True, False), (True, True), (False, False), (False, False)]
    assert [layer.firing_rate for layer in layers] == [spikes.firing_rate(), None] * 2
    forward = 2 * 2 * 8 * (64 * 16 * 16 + 2)
    backward = 2 * 2 * 8 * (64 * 16 * 16 + 2 * 2)
    assert operations(floors.convolutions(layers, torch.float32)) == 2 * forward + backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_alone_may_skip_what_did_not_fire(dtype):
    spikes, network = bits_of((8, 64, 32, 32)), nn.Conv2d(64, 64, 3)
    with floors.recorded(network) as layers:
        network(spikes)
        network(spikes.numbers())
    for skipping, expected in ((False, {}), (True, {("spike_conv2d", "cpu"): 1, ("weight gradient", "cpu"): 1})):
        run = floors.convolutions(layers, dtype, skipping=skipping)
        spike_conv.calls.clear()
        run()
        assert spike_conv.calls == expected


@pytest.mark.parametrize("contestant", ["ours, float32", "ours, bfloat16"])
def test_contestants_skip_zeros_or_are_dense(contestant):
    case = CASES["resnet18-cifar"].tiny()._replace(size=32, batch={"cpu": 8})
    problem, steps = Problem(case, CPU), {}
    network = bench_inference.Network(problem)
    for name in (contestant, f"{contestant}, dense"):
        steps[name], passes = CONTESTANTS[name][0](problem), network.step(name)
        for run in (steps[name], passes):
            spike_conv.calls.clear()
            run()
            assert bool(spike_conv.calls) == (name == contestant)
    losses = [step.forward().item() for step in steps.values()]
    # Measured up to 2e-3: a few spikes differ.
    assert losses[0] == pytest.approx(losses[1], rel=bench_train.LOSS[CONTESTANTS[contestant][1]])


def test_network_for_inference_is_one_of_its_firing_rate():
    network = bench_inference.Network(Problem(CASES["resnet18-cifar"].tiny(), CPU))
    rates, neurons = [], [m for m in network.published.modules() if isinstance(m, published.LoopedLIF)]
    for neuron in neurons:
        neuron.register_forward_hook(lambda module, arguments, spikes: rates.append(spikes.flatten()))
    with torch.no_grad():
        network.published(network.inputs)
    assert network.firing_rate == pytest.approx(torch.cat(rates).mean().item(), abs=1e-3)  # measured 1e-8
    assert not any(layer.trains for layer in network.layers)
    student = network.student
    with torch.no_grad():
        assert operations(lambda: student(network.arranged)) == operations(
            floors.convolutions(network.layers, torch.float32)
        )


def test_shares_beyond_those_timed_are_shown_as_such():
    times = {bench_spike_conv.DENSE: [1.0, 1.0]}
    names = [name for name in bench_spike_conv.CONTESTANTS if name not in times]
    times |= {name: [0.25 if index < 4 else 4.0] * 2 for index, name in enumerate(names)}
    assert bench_spike_conv.shown(bench_spike_conv.turn(times)) == "25 %"
    assert bench_spike_conv.shown(Figure(0.25, -math.inf, math.inf, 2)) == "25 % (< 2 to > 80)"


@pytest.mark.skipif(measure.resident_bytes() is None, reason="this system does not tell a process its memory")
def test_peak_memory_of_a_fresh_process():
    peak = bench_train.peak_bytes("resnet18-cifar", "ours, float32", "", tiny=True)
    # The student's weights, their gradients and momentum, and two teachers.
    assert 4 * (3 * 11.2e6 + 2 * 21.3e6) < peak < 2**30


def test_race_takes_turns():
    turns = []
    times = measure.race({name: lambda name=name: turns.append(name) for name in "abc"}, 0.0, 3)
    assert turns == list("abcabcabc")
    assert [len(seconds) for seconds in times.values()] == [3, 3, 3]
    assert min(min(seconds) for seconds in times.values()) > 0


def test_a_turn_of_a_short_step_is_many_calls():
    turns = []
    steps = {"short": lambda: turns.append("short"), "long": lambda: (turns.append("long"), time.sleep(0.02))}
    times = measure.race(steps, 0.0, 3, turn=0.01)
    assert turns.count("long") == 1 + 3  # the first tells how long it takes
    assert turns.count("short") > 100
    assert max(times["short"]) < 1e-3
    assert min(times["long"]) >= 0.02
