"""Batches on their way to the device."""

import os
import signal
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from processes import children
from seal_fast.train.feed import Feed
from seal_fast.train.stopping import Signals, leave_to_trainer

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


class Slow:
    """Takes a moment for each of three batches."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 3

    def __iter__(self):
        for index in range(3):
            time.sleep(self.seconds)
            yield torch.full((4, 3, 2, 2), index, dtype=torch.uint8), torch.full((4,), index)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_in_order_and_finished(device):
    device = torch.device(device)
    feed = Feed(Slow(0), device, lambda images: images.float() / 2)
    assert len(feed) == 3
    for _ in range(2):  # a second epoch begins anew
        batches = list(feed)
        assert len(batches) == 3
        for index, (images, labels) in enumerate(batches):
            assert images.device.type == labels.device.type == device.type
            assert torch.equal(images, torch.full((4, 3, 2, 2), index / 2, device=device))
            assert torch.equal(labels, torch.full((4,), index, device=device))


def test_batches_that_are_finished_pass_as_they_are():
    images, labels = next(iter(Feed([(torch.ones(2, 3), torch.zeros(2))], torch.device("cpu"))))
    assert torch.equal(images, torch.ones(2, 3))
    assert torch.equal(labels, torch.zeros(2))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batches_come_as_networks_read_them(memory_format):
    """So that nothing in a step copies them: images in the memory format, events with time outermost."""
    images, events = torch.rand(4, 3, 5, 6), torch.rand(4, 7, 2, 5, 6)
    got, _ = next(iter(Feed([(images, torch.zeros(4))], torch.device("cpu"), None, memory_format)))
    assert torch.equal(got, images)
    assert got.is_contiguous(memory_format=memory_format)
    got, _ = next(iter(Feed([(events, torch.zeros(4))], torch.device("cpu"), None, memory_format)))
    assert torch.equal(got, events.transpose(0, 1))
    rows = got.flatten(0, 1)
    assert rows.data_ptr() == got.data_ptr()
    assert rows.is_contiguous(memory_format=memory_format)


def test_waiting_for_the_loader_counts_and_the_step_does_not():
    feed = Feed(Slow(0.02), torch.device("cpu"))
    for _ in feed:
        time.sleep(0.1)
    assert 0.06 <= feed.waited < 0.2  # three batches took 0.06 s, the three steps 0.3 s
    before = feed.waited
    list(feed)
    assert feed.waited >= before + 0.06


def test_errors_of_the_loader_pass():
    def broken():
        yield torch.ones(1), torch.ones(1)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(Feed(broken(), torch.device("cpu")))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc tells which processes were started")
def test_a_signal_while_processes_are_starting_does_not_end_them():
    signals = Signals()

    def start_slowly(_worker):
        time.sleep(0.5)
        leave_to_trainer(signals.training)

    def terminate():
        for child in children(os.getpid()):
            os.kill(child, signal.SIGTERM)

    dataset = TensorDataset(torch.arange(8.0), torch.arange(8))
    loader = DataLoader(dataset, 2, num_workers=1, worker_init_fn=start_slowly)
    with signals:
        timer = threading.Timer(0.2, terminate)
        timer.start()
        labels = [labels.tolist() for _, labels in Feed(loader, torch.device("cpu"))]
        timer.join()
    assert labels == [[0, 1], [2, 3], [4, 5], [6, 7]]
    signals_blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGTERM not in signals_blocked
