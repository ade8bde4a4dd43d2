import argparse
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from seal_fast.train import checkpoint, harmless
from seal_fast.train.checkpoint import load_teacher
from seal_fast.train.errors import UsageError

FORMS = {
    "bare": lambda state: state,
    **{key: lambda state, key=key: {key: state, "epoch": 3} for key in checkpoint._KEYS},
    **{
        prefix: lambda state, prefix=prefix: {"best_net": {f"{prefix}{name}": value for name, value in state.items()}}
        for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.")
    },
    "a compiled layer": lambda state: {
        name.replace("layer1.", "layer1._orig_mod."): value for name, value in state.items()
    },
    "averaged": lambda state: {"n_averaged": torch.tensor(3), **{f"module.{name}": state[name] for name in state}},
    "a model beside": lambda state: {"net": 3, "model": state},
}


@pytest.mark.parametrize("form", FORMS)
def test_teacher_of_each_form_in_use_comes_ready_to_teach(form, save_teacher, tmp_path):
    path: Path = save_teacher("resnet18", in_channels=2)
    state = torch.load(path, weights_only=True)["best_net"]
    torch.save(FORMS[form](state), path)
    network = load_teacher(path, "resnet18", num_classes=10, in_channels=2, stem=None)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_network_of_compiled_and_parallel_modules_is_found(tmp_path):
    """The names that torch itself gives, not those that this test expects."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    wrapped = torch.compile(torch.nn.DataParallel(torch.optim.swa_utils.AveragedModel(network)))
    assert list(wrapped.state_dict()) != list(network.state_dict())
    assert list(checkpoint.weights_of({"model": wrapped.state_dict()})) == list(network.state_dict())


def test_a_network_with_a_module_of_that_name_keeps_it():
    state = {"module.weight": torch.zeros(1), "weight": torch.zeros(1)}
    assert list(checkpoint.weights_of({"net": state})) == list(state)


def test_numbers_options_and_paths_beside_the_weights_are_read_without_running_anything(tmp_path):
    values = {
        "float64": np.float64(0.5),
        "float32": np.float32(0.25),
        "float16": np.float16(-2.5),
        "int64": np.int64(-7),
        "uint8": np.uint8(250),
        "bool": np.bool_(True),
        "big-endian": np.array(3.5, ">f4")[()],
    }
    args = argparse.Namespace(lr=0.1, steps=[1, 2], where=Path("/a/b"))
    content = {"model": {"weight": torch.ones(2)}, "args": args, "random": np.random.get_state(), **values}
    torch.save(content, tmp_path / "a.pt")
    found = checkpoint.load(tmp_path / "a.pt")
    assert {name: found[name] for name in values} == {name: value.item() for name, value in values.items()}
    assert all(type(found[name]) in (bool, int, float) for name in values)
    assert vars(found["args"]) == {"lr": 0.1, "steps": [1, 2], "where": "/a/b"}
    assert torch.equal(checkpoint.weights_of(found)["weight"], torch.ones(2))


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("where", ["in options", "in an array", "as a data type", "as a number"])
def test_what_could_run_code_is_refused_wherever_it_is(where, tmp_path):
    payload = Payload(tmp_path / "mark")
    content = {
        "in options": argparse.Namespace(lr=payload),
        "in an array": np.array([payload], dtype=object),
        "as a data type": np.dtype([("a", "i4")], metadata={"b": payload}),
        "as a number": payload,
    }[where]
    torch.save({"net": {}, "args": content}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match=r"is refused: it holds [a-z._]+, which could run code"):
        checkpoint.load(tmp_path / "a.pt")
    assert not (tmp_path / "mark").exists()


class Configuration:
    """Of a program that is not at hand where a checkpoint is read."""


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_refused_comes_with_the_way_to_save_its_weights(whole, tmp_path):
    network = torch.nn.Linear(2, 2)
    torch.save(network if whole else {"model": network.state_dict(), "of": Configuration()}, tmp_path / "old.pt")
    with pytest.raises(UsageError) as caught:
        checkpoint.load(tmp_path / "old.pt")
    assert ("Linear" if whole else "Configuration") + ", which could run code when it is read" in str(caught.value)
    how = 'torch.save(old["model"], NEW) after old = torch.load(OLD, weights_only=False)'
    assert f"save its weights alone: {how}, or old.state_dict() where it is a whole module." in str(caught.value)
    save, old = how.replace("OLD", f"'{tmp_path}/old.pt'").replace("NEW", f"'{tmp_path}/new.pt'").split(" after ")
    if whole:
        save = save.replace('old["model"]', "old.state_dict()")
    exec(f"{old}; {save}", {"torch": torch})
    assert list(checkpoint.weights_of(checkpoint.load(tmp_path / "new.pt"))) == ["weight", "bias"]


def test_another_protocol_of_pickle_is_named(tmp_path, recwarn):
    torch.save({"net": {"weight": torch.ones(1)}, "bytes": b"x"}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(UsageError, match=r"refused: it is pickled in another way than torch\.save does it; if"):
        checkpoint.load(tmp_path / "a.pt")
    assert not recwarn.list


def test_a_path_that_would_fill_the_memory_is_none():
    parts = "a" * 1000
    for _ in range(26):
        parts = harmless.path(parts, parts)
        assert len(parts) < 5000
    assert harmless.path("/a", "b") == "/a/b"
    assert harmless.path(["a"] * 2) == ""
    assert harmless.DType(["f8"]).name == ""


def test_a_checkpoint_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(UsageError, match=r"checkpoint .*a\.pt cannot be read: Is a directory\."):
        checkpoint.load(tmp_path / "a.pt")


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
