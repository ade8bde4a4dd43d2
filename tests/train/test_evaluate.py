"""A run's best network is loaded again, and evaluated as its training did."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import seal_fast.train
from seal_fast.models import STUDENTS, TEACHERS, student, teacher
from seal_fast.train import distill, evaluate
from seal_fast.train import teacher as teacher_trainer
from seal_fast.train.checks import resolve
from seal_fast.train.networks import Trained

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
    trained, spiking = runs[role], role == "student"
    path = tmp_path / "figures.json"
    assert evaluate.main([str(trained["folder"]), "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in ("accuracy", "accuracy_at"):
        assert found[name] == trained[name]
    assert found["firing_rate"] == pytest.approx(trained["firing_rate"], rel=1e-12)  # sums of whole numbers
    assert (found["dataset"], found["samples"], len(found["accuracy_at"])) == ("DIGITS", 360, 2 if spiking else 1)
    output = capsys.readouterr().out
    assert f"{trained['folder']}/best.pt: a resnet8" in output
    assert f"in training: {trained['accuracy']:.2%}" in output
    assert ("mean of layers" in output) == spiking
    assert output.splitlines()[2].split() == [f"{accuracy:.2%}" for accuracy in trained["accuracy_at"]]


def test_script_runs_on_two_ranks(runs, tmp_path):
    path, trained = tmp_path / "figures.json", runs["student"]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train/evaluate.py"]
    words += [str(trained["folder"]), "--json", str(path)]
    result = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("accuracy on 360 validation samples of DIGITS") == 1
    found = json.loads(path.read_text(encoding="utf-8"))
    # Other batches, so other sums in the convolutions: measured equal, three images are allowed for.
    assert found["accuracy_at"] == pytest.approx(trained["accuracy_at"], abs=3.5 / 360)


def test_steps_kernels_and_precision_may_differ(runs, capsys):
    folder = runs["student"]["folder"]
    assert evaluate.main([str(folder), *["--T", "5", "--backend", "torch", "--amp", "off"]]) == 0
    first, title, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("a resnet8 over 5 time steps, epoch 1; device cpu, amp off, neurons on torch")
    assert title.endswith("t = 5")
    options = evaluate.parser().parse_args([str(folder), "--val_batch_size", "50"])
    found = evaluate.options_of(Trained(folder), options)
    assert (found.val_batch_size, found.T, found.decay) == (50, 2, 0.25)


@pytest.mark.parametrize("ranks", ["1", "80"])
def test_batches_of_training_do_not_matter(ranks, runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    found = evaluate.options_of(Trained(runs["student"]["folder"]), evaluate.parser().parse_args(["-"]))
    assert resolve(found, role="student").accumulate == 1


def test_loaded_network_is_the_trained_one(runs):
    folder = runs["student"]["folder"]
    network = seal_fast.train.load(folder, backend="torch")
    assert not network.training
    options = {"time_steps": 2, "tau": 4 / 3, "v_threshold": 0.8, "v_reset": None, "backend": "torch"}
    expected = student("resnet8", num_classes=10, in_channels=1, **options)
    expected.load_state_dict(torch.load(folder / "best.pt", weights_only=True)["best_net"])
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(images), expected.eval()(images))
        assert seal_fast.train.load(folder / "best.pt", T=3)(images).shape == (3, 3, 10)
    taught = runs["teacher"]["folder"]
    assert not seal_fast.train.load(taught).training
    with pytest.raises(ValueError, match=r"T is for students; .*best\.pt holds a teacher\."):
        seal_fast.train.load(taught, T=3)


@pytest.mark.parametrize("arch", [*STUDENTS, *TEACHERS])
def test_every_architecture_is_loaded(arch, tmp_path):
    sizes = {"num_classes": 7, "in_channels": 2}
    if arch in STUDENTS:
        network = student(arch, **sizes)
        # What options have come since has its default.
        options = {"stu_arch": arch, "T": 4, "decay": 0.5, "v_reset": 0.0}
    else:
        network = teacher(arch, **sizes)
        options = {"arch": arch}
    options["dataset"] = "CIFAR10"
    content = {"best_net": network.state_dict(), "options": options, "epoch": 1, "accuracy": 0.5}
    torch.save(content, tmp_path / "best.pt")
    loaded = seal_fast.train.load(tmp_path)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_the_file_says_how_many_classes_and_channels_there_are(runs, tmp_path):
    """The first and the last matrix of a network need not be its stem's and its readout's."""
    content = torch.load(runs["student"]["folder"] / "best.pt", weights_only=True)
    assert (content["num_classes"], content["in_channels"]) == (10, 1)
    content["best_net"] = dict(reversed(content["best_net"].items()))
    torch.save(content, tmp_path / "best.pt")
    trained = Trained(tmp_path)
    assert (trained.num_classes, trained.in_channels) == (10, 1)
    assert seal_fast.train.load(tmp_path)(torch.zeros(2, 1, 8, 8)).shape == (2, 2, 10)


def sentence(capsys, *words):
    """The one line of an evaluation that is refused."""
    assert evaluate.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


UNKNOWN = "does not say which network it holds"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"options": None}, UNKNOWN),
        ({"options": {"dataset": "DIGITS"}}, UNKNOWN),
        ({"options": {"stu_arch": "resnet8"}}, UNKNOWN),
        ({"accuracy": "high"}, UNKNOWN),
        ({"epoch": None}, UNKNOWN),
        ({"best_net": [1, 2]}, "holds no weights of a network"),
        ({"best_net": {"a": 1}}, "holds no weights of a network"),
        ({"best_net": {}}, "holds no weights of a network"),
        ({"best_net": {"a": torch.zeros(3, 4)}}, "does not hold a resnet8"),
    ],
)
def test_what_is_no_run_is_refused(changes, expected, runs, tmp_path, capsys):
    content = torch.load(runs["student"]["folder"] / "best.pt", weights_only=True)
    torch.save({**content, **changes}, tmp_path / "best.pt")
    assert expected in sentence(capsys, tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("stu_arch", "resnet18", "does not hold a resnet18"),
        ("stu_arch", "resnet20", "arch of a student must be one of .*; got 'resnet20'"),
        ("dataset", "KMNIST", "--dataset must be one of .*; got 'KMNIST'"),
        ("amp", "bf8", "--amp must be one of auto, off, bf16, fp16; .* has 'bf8'"),
        ("backend", "abacus", "--backend: .*abacus"),
        ("data_path", "/nowhere", "--data_path: the run found its data in /nowhere, which is not here"),
    ],
)
def test_options_that_cannot_hold_here_are_refused(option, value, expected, runs, tmp_path, capsys):
    content = torch.load(runs["student"]["folder"] / "best.pt", weights_only=True)
    content["options"][option] = value
    torch.save(content, tmp_path / "best.pt")
    assert re.search(expected, sentence(capsys, tmp_path))


def test_mistakes_of_the_command_are_told(runs, tmp_path, capsys):
    folder = runs["student"]["folder"]
    assert f"there is no checkpoint at {tmp_path}/best.pt" in sentence(capsys, tmp_path)
    assert "--T must be at least 1; got 0" in sentence(capsys, folder, "--T", 0)
    assert "--device 'warp' cannot be used" in sentence(capsys, folder, "--device", "warp")
    assert "--backend is for students" in sentence(capsys, runs["teacher"]["folder"], "--backend", "torch")
    content = torch.load(folder / "best.pt", weights_only=True)
    weights = content["best_net"]
    classifier = list(weights)[-2:]  # its matrix and its bias
    fewer = {**content, "num_classes": 4, "best_net": {**weights, **{name: weights[name][:4] for name in classifier}}}
    torch.save(fewer, tmp_path / "fewer.pt")
    assert "tells 4 classes apart; DIGITS has 10" in sentence(capsys, tmp_path / "fewer.pt")


def test_figures_go_into_a_pipe_or_through_a_link(runs, tmp_path):
    folder, pipe, link = runs["teacher"]["folder"], tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "figures.json")
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    for path in (pipe, link):
        assert evaluate.main([str(folder), "--json", str(path)]) == 0
    reader.join(60)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert json.loads(read[0]) == json.loads((tmp_path / "figures.json").read_text())


def test_figures_that_cannot_be_written(runs, tmp_path, capsys):
    missing = tmp_path / "no" / "figures.json"
    assert evaluate.main([str(runs["teacher"]["folder"]), "--json", str(missing)]) == 1
    error = capsys.readouterr().err
    assert error == f"seal-fast-evaluate: error: No such file or directory: {missing}; the run's folder is as it was.\n"
