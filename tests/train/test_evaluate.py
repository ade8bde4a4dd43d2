"""A run's best network is loaded again, and evaluated as its training did."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seal_fast.train
from seal_fast.models import STUDENTS, TEACHERS, student, teacher
from seal_fast.train import distill, evaluate
from seal_fast.train import teacher as teacher_trainer

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a student and of a teacher of the digits, trained for an epoch, and what the trainers returned."""
    logs = tmp_path_factory.mktemp("logs")
    shared = f"--dataset DIGITS --num_epoch 1 --log_path {logs}"
    kinds = {
        "student": (distill, "--method ce --T 2 --decay 0.25 --thresh 0.8 --v_reset none"),
        "teacher": (teacher_trainer, ""),
    }
    return {
        name: module.run(getattr(module, f"{parser}_parser")().parse_args(f"{shared} --run_name {name} {own}".split()))
        for (name, (module, own)), parser in zip(kinds.items(), ("distill", "teacher"), strict=True)
    }


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_evaluation_finds_what_training_found(role, runs, tmp_path, capsys):
    trained = runs[role]
    path = tmp_path / "figures.json"
    assert evaluate.main([str(trained["folder"]), "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in ("accuracy", "accuracy_at"):
        assert found[name] == trained[name]
    assert found["firing_rate"] == pytest.approx(trained["firing_rate"], rel=1e-12)  # sums of whole numbers
    assert (found["dataset"], found["samples"], found["T"]) == ("DIGITS", 360, 2 if role == "student" else 1)
    output = capsys.readouterr().out
    assert f"{trained['folder']}/best.pt: a resnet8" in output
    assert f"in training: {trained['accuracy']:.2%}" in output
    assert ("mean of layers" in output) == (role == "student")
    for accuracy in trained["accuracy_at"]:
        assert f" {accuracy:.2%}" in output


def test_script_runs(runs):
    words = [sys.executable, "train/evaluate.py", str(runs["student"]["folder"])]
    result = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "accuracy on 360 validation samples of DIGITS" in result.stdout


def test_steps_kernels_and_precision_may_differ(runs):
    folder, changes = runs["student"]["folder"], "--T 5 --backend torch --amp off --val_batch_size 50"
    options = evaluate.parser().parse_args([str(folder), *changes.split()])
    found = evaluate.run(options)
    assert found["T"] == len(found["accuracy_at"]) == 5
    # The first two steps are those of training, whose arithmetic differed in its rounding alone.
    assert found["accuracy_at"][:2] == pytest.approx(runs["student"]["accuracy_at"], abs=0.02)


def test_loaded_network_is_the_trained_one(runs):
    folder = runs["student"]["folder"]
    network = seal_fast.train.load(folder, backend="torch")
    assert not network.training
    expected = student("resnet8", num_classes=10, in_channels=1, time_steps=2, tau=4 / 3, v_threshold=0.8, v_reset=None)
    expected.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["best_net"])
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(images), expected.eval()(images))
        assert seal_fast.train.load(folder / "best.pt", T=3)(images).shape == (3, 3, 10)
    assert not seal_fast.train.load(runs["teacher"]["folder"]).training


@pytest.mark.parametrize("arch", [*STUDENTS, *TEACHERS])
def test_every_architecture_is_loaded(arch, tmp_path):
    sizes = {"num_classes": 7, "in_channels": 2}
    if arch in STUDENTS:
        network = student(arch, **sizes)
        options = {"stu_arch": arch, "T": 4, "decay": 0.5, "thresh": 1.0, "v_reset": 0.0, "detach_reset": False}
        options["backend"] = "auto"
    else:
        network = teacher(arch, **sizes)
        options = {"arch": arch}
    options["dataset"] = "CIFAR10"
    content = {"best_net": network.state_dict(), "options": options, "epoch": 1, "accuracy": 0.5}
    torch.save(content, tmp_path / "best.pt")
    loaded = seal_fast.train.load(tmp_path)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    def sentence(*words):
        assert evaluate.main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    content = torch.load(runs["student"]["folder"] / "best.pt", weights_only=True)
    weights = content["best_net"]
    classifier = list(weights)[-2:]  # its matrix and its bias
    for name, changes in {
        "bare": {"options": None},
        "other": {"options": {**content["options"], "stu_arch": "resnet18"}},
        "fewer": {"best_net": {**weights, **{name: weights[name][:4] for name in classifier}}},
    }.items():
        torch.save({**content, **changes}, tmp_path / name)
    assert f"there is no checkpoint at {tmp_path}/best.pt" in sentence(tmp_path)
    assert "does not say which network it holds" in sentence(tmp_path / "bare")
    assert "does not hold a resnet18" in sentence(tmp_path / "other")
    assert "tells 4 classes apart; DIGITS has 10" in sentence(tmp_path / "fewer")
    folder = runs["student"]["folder"]
    assert "--T must be at least 1; got 0" in sentence(folder, "--T", 0)
    assert "--device 'warp' cannot be used" in sentence(folder, "--device", "warp")
    with pytest.raises(TypeError, match="no option 'steps'"):
        seal_fast.train.load(folder, steps=3)


def test_figures_that_cannot_be_written(runs, tmp_path, capsys):
    missing = tmp_path / "no" / "figures.json"
    assert evaluate.main([str(runs["teacher"]["folder"]), "--json", str(missing)]) == 1
    error = capsys.readouterr().err
    assert error == f"seal-fast-evaluate: error: No such file or directory: {missing}; nothing was changed.\n"
