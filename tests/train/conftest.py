from pathlib import Path

import pytest
import torch

from makers import cifar10
from seal_fast.models import teacher


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory) -> Path:
    """Forty training and eight validation images in CIFAR-10's format."""
    return cifar10(tmp_path_factory.mktemp("cifar10"))


@pytest.fixture
def save_teacher(tmp_path):
    """Write an untrained teacher's checkpoint in the published form and return its path."""

    def save(arch: str, *, num_classes: int = 10, in_channels: int = 3, stem: str | None = None) -> Path:
        torch.manual_seed(0)
        network = teacher(arch, num_classes=num_classes, in_channels=in_channels, stem=stem)
        path = tmp_path / f"{arch}.pth"
        torch.save({"best_net": network.state_dict()}, path)
        return path

    return save
