"""Counters by which the last block of a launch knows itself; without a GPU, on a feigned one."""

import contextlib
import types
import weakref

import pytest
import torch

from seal_fast.kernels.launch import counters as launcher

CUDA = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """What torch says of a GPU: its stream, whether it is captured, and what zeros were made."""
    state = types.SimpleNamespace(stream=0, capturing=False, made=[], waited=0)
    zeros = torch.zeros

    def made(number, dtype, device):
        found = zeros(number, dtype=dtype)
        state.made.append((number, state.capturing, weakref.ref(found)))
        return found

    def waited():
        state.waited += 1

    stream = types.SimpleNamespace(synchronize=waited)
    monkeypatch.setattr(launcher, "_counters", {})
    monkeypatch.setattr(launcher, "_reserves", {})
    monkeypatch.setattr(launcher, "is_current", lambda device: device == CUDA)
    monkeypatch.setattr(launcher, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch, "zeros", made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def sizes(gpu, capturing=False):
    """Of what was made in captures, or outside of them, which lives for ever."""
    assert capturing or all(made() is not None for _, inside, made in gpu.made if not inside)
    return [size for size, inside, _ in gpu.made if inside == capturing]


def capture(gpu, *numbers):
    gpu.capturing = True
    found = [launcher.counters(CUDA, number) for number in numbers]
    gpu.capturing = False
    assert [each.tolist() for each in found] == [[0] * number for number in numbers]
    return found


def test_launches_of_a_stream_share_their_counters(gpu):
    first = launcher.counters(CUDA, 1)
    assert launcher.counters(CUDA, 70) is first
    assert launcher.counters(CUDA, 1024) is first
    assert sizes(gpu) == [launcher._Reserve.SIZE, 1024]
    assert gpu.waited == 2  # whoever gets them need not


def test_more_counters_take_the_place_of_none_that_a_launch_may_use(gpu):
    first, more = launcher.counters(CUDA, 1), launcher.counters(CUDA, 1025)
    assert len(more) == 2048
    assert launcher.counters(CUDA, 2048) is more
    assert launcher.counters(CUDA, 1) is first


def test_each_stream_and_device_has_counters_and_each_launch_in_a_graph_its_own(gpu):
    first = launcher.counters(CUDA, 3)
    assert launcher.counters(torch.device("cuda", 0), 3) is not first
    gpu.stream = 4096
    second = launcher.counters(CUDA, 3)
    assert second is not first
    before = len(gpu.made)
    taken = capture(gpu, 3, 1, 5)
    assert launcher.counters(CUDA, 3) is second
    assert len(gpu.made) == before
    for number, each in enumerate(taken):
        each.fill_(number + 1)
    assert [each.tolist() for each in taken] == [[1] * 3, [2], [3] * 5]  # none is another's
    assert not any(each.any() for each in launcher._counters.values())


def test_a_reserve_for_graphs_is_filled_between_them_and_no_longer_than_it_may(gpu, monkeypatch):
    monkeypatch.setattr(launcher._Reserve, "SIZE", 8)
    monkeypatch.setattr(launcher._Reserve, "MOST", 16)
    capture(gpu, 2)  # before anything else: there is no reserve
    assert sizes(gpu, capturing=True) == [2]
    launcher.counters(CUDA, 1)
    assert sizes(gpu).count(8) == 1
    capture(gpu, 4, 3)  # and 1 is left
    launcher.counters(CUDA, 1)
    assert sizes(gpu).count(8) == 2
    capture(gpu, 9, 8, 1)  # too many, all, and more than are left
    launcher.counters(CUDA, 1)
    assert sizes(gpu).count(8) == 2
    assert sizes(gpu, capturing=True) == [2, 9, 1]


@pytest.mark.parametrize("number", [0, 1, 2000])
def test_another_device_gets_new_zeros(number):
    one, other = (launcher.counters(torch.device("cpu"), number) for _ in range(2))
    assert one is not other
    assert one.tolist() == [0] * number
    assert one.dtype == torch.int32
