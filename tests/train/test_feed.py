"""Batches on their way to the device."""

import time

import pytest
import torch

from seal_fast.train.feed import Feed

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
