import errno
import os
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


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    checkpoint.save_keeping_previous({"epoch": 1}, path, previous)
    assert not previous.exists()
    checkpoint.save_keeping_previous({"epoch": 2}, path, previous)
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            with pytest.raises(OSError, match=r"Input/output error.*last\.pt"):
                checkpoint.save_keeping_previous({"epoch": 3}, path, previous)
        assert (checkpoint.load(path), checkpoint.load(previous)) == ({"epoch": 2}, {"epoch": 1})
        assert {file.name for file in tmp_path.iterdir()} <= {"last.pt", "previous.pt", "previous.pt.partial"}
    checkpoint.save_keeping_previous({"epoch": 3}, path, previous)
    assert (checkpoint.load(path), checkpoint.load(previous)) == ({"epoch": 3}, {"epoch": 2})


def test_a_file_system_without_links_keeps_the_previous_checkpoint_too(tmp_path, monkeypatch):
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    monkeypatch.setattr(os, "link", fails)
    for epoch in range(3):
        checkpoint.save_keeping_previous({"epoch": epoch}, path, previous)
    assert (checkpoint.load(path), checkpoint.load(previous)) == ({"epoch": 2}, {"epoch": 1})


def fails(*_args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
