from pathlib import Path

import pytest
import torch

from seal_fast.train import checkpoint
from seal_fast.train.checkpoint import load_teacher
from seal_fast.train.errors import UsageError


@pytest.mark.parametrize("form", ["best_net", "bare", "DataParallel"])
def test_teacher_of_each_published_form_comes_ready_to_teach(form, save_teacher, tmp_path):
    path: Path = save_teacher("resnet18", in_channels=2)
    state = torch.load(path, weights_only=True)["best_net"]
    if form == "bare":
        torch.save(state, path)
    elif form == "DataParallel":
        torch.save({"best_net": {f"module.{name}": value for name, value in state.items()}}, path)
    network = load_teacher(path, "resnet18", num_classes=10, in_channels=2, stem=None)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_load_names_a_missing_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"no checkpoint at .*gone\.pt"):
        checkpoint.load(tmp_path / "gone.pt")
