"""Counters of Triton kernels by which the last program to finish knows itself; without a GPU, on a feigned one."""

import contextlib
import types

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from seal_fast.kernels.launch import triton_counters as launcher

CUDA = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """What torch says of a GPU: its stream, whether it is captured, and how many zeros were made."""
    state = types.SimpleNamespace(stream=0, capturing=False, made=[])
    zeros = torch.zeros

    def made(number, dtype, device):
        assert dtype == torch.int32
        state.made.append((number, device))
        return zeros(number, dtype=dtype)

    stream = types.SimpleNamespace(device=CUDA, wait_stream=lambda other: None)
    monkeypatch.setattr(launcher, "_counters", {})
    monkeypatch.setattr(launcher, "is_current", lambda device: device == CUDA)
    monkeypatch.setattr(launcher, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch, "zeros", made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_launches_of_a_stream_share_their_counters(gpu):
    first = launcher.counters(CUDA, 1)
    assert launcher.counters(CUDA, 70) is first
    assert launcher.counters(CUDA, 1024) is first
    assert gpu.made == [(1024, CUDA)]


def test_more_counters_take_the_place_of_none_that_a_launch_may_use(gpu):
    first, more = launcher.counters(CUDA, 1), launcher.counters(CUDA, 1025)
    assert len(more) == 2048
    assert launcher.counters(CUDA, 2048) is more
    assert launcher.counters(CUDA, 1) is first
    assert len(gpu.made) == 2


def test_each_stream_has_counters_and_each_graph_its_own(gpu):
    first = launcher.counters(CUDA, 3)
    assert launcher.counters(torch.device("cuda", 0), 3) is not first
    gpu.stream = 4096
    second = launcher.counters(CUDA, 3)
    assert second is not first
    gpu.capturing = True
    captured = launcher.counters(CUDA, 3)
    assert len(captured) == 3
    assert launcher.counters(CUDA, 3) is not captured
    gpu.capturing = False
    assert launcher.counters(CUDA, 3) is second


@pytest.mark.parametrize("number", [0, 1, 2000])
def test_another_device_gets_new_zeros(number):
    one, other = (launcher.counters(torch.device("cpu"), number) for _ in range(2))
    assert one is not other
    assert one.tolist() == [0] * number
    assert one.dtype == torch.int32
