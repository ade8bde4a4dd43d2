"""What the benchmark of the training step measures with: its floor, bytes kept for backward, peak memory, turns."""

import time

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import bench_train
import floors
import measure
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
    assert layers == [(network[index], shape, *flags) for index, shape, *flags in expected]


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
