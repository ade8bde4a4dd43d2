"""docs/scaling.md says what two ranks really send."""

from pathlib import Path

import pytest
import torch
from torch import nn

import processes
import traffic
from seal_fast.models import student
from seal_fast.models.snn import Neuron

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


@pytest.fixture(scope="module")
def sent(tmp_path_factory) -> dict:
    """Of one step of the ImageNet student on two ranks; image size, batch and T change none of it."""
    path = tmp_path_factory.mktemp("traffic") / "traffic.pt"
    processes.in_ranks(traffic.count, 2, "preact_resnet34", (2, 3, 32, 32), 1000, 1, 2, path)
    return torch.load(path, weights_only=True)


def test_page_has_the_bytes_and_messages_that_are_sent(sent):
    page = PAGE.read_text(encoding="utf-8")
    statistics = sent["statistics"]
    for row in (
        f"| {sent['gradient']['calls']} | {sent['gradient']['bytes']:,} |",
        f"| {statistics['all_gather calls']} all_gather | {statistics['all_gather bytes']:,} |",
        f"| {statistics['all_reduce calls']} all_reduce | {statistics['all_reduce bytes']:,} |",
    ):
        assert row in page, row
    assert f"{statistics['all_gather calls'] + statistics['all_reduce calls']} · l(N)" in page


def test_bytes_follow_from_the_network(sent):
    network = student("preact_resnet34", num_classes=1000)
    assert sent["gradient"]["bytes"] == 4 * sum(parameter.numel() for parameter in network.parameters())
    channels = [module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    alone = [64, 512]  # the stem's and the last, with no neuron behind them
    fused, neurons = sum(channels) - sum(alone), sum(isinstance(module, Neuron) for module in network.modules())
    assert neurons == 32
    assert sent["statistics"]["all_gather bytes"] == 8 * (2 * fused + len(channels) - len(alone))  # float64
    # Backward: one sum for each neuron layer and one for each of its batch norms; the others: 2 forward, 2 backward.
    shortcuts = 128 + 256 + 512
    assert sent["statistics"]["all_reduce bytes"] == 4 * (2 * fused - shortcuts) + sum(4 * (4 * c + 1) for c in alone)
