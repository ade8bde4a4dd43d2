"""A student or teacher that the published code has trained is evaluated, fine-tuned and loaded."""

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import makers
import seal_fast.train
from golden import STATE_DICTS, filled_student, filled_teacher, weight
from seal_fast import models
from seal_fast.train import distill, evaluate, teacher
from seal_fast.train.data import load
from seal_fast.train.engine import SpikeRecorder
from seal_fast.train.networks import Trained
from seal_fast.train.tasks import tau_of

PLAIN = "--num_workers 0 --device cpu"


def published(path, key: str, **more):
    """Write a checkpoint as the published code does: the golden weights under the published names, and an optimiser."""
    state = {name: torch.from_numpy(np.asarray(weight(name, tuple(shape)))) for name, shape in STATE_DICTS[key].items()}
    trained = [torch.nn.Parameter(value.clone()) for value in state.values() if value.is_floating_point()]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in trained).backward()
    optimizer.step()
    torch.save({"best_net": state, "optimizer": optimizer.state_dict(), **more}, path)
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The path of a published resnet18 for CIFAR-10."""
    return published(tmp_path_factory.mktemp("published") / "model_weights.pth", "student/resnet18/in3/classes10")


def sentence(main, capsys, *words):
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("decay", [None, 0.25])
def test_a_published_student_is_evaluated(decay, student, tmp_path, capsys):
    words = f"{student} --stu_arch resnet18 --dataset CIFAR10 --data_path {tmp_path} --T 3 --amp off {PLAIN}"
    words += f" --json {tmp_path}/figures.json" + (f" --decay {decay} --thresh 0.5 --v_reset none" if decay else "")
    neuron = {"tau": tau_of(decay), "v_threshold": 0.5, "v_reset": None} if decay else {"tau": 2.0}
    network = filled_student("resnet18", torch.float32, num_classes=10, time_steps=3, **neuron).eval()
    makers.cifar10(tmp_path)
    splits = load("CIFAR10", tmp_path, role="student", time_steps=3)
    images = splits.finish_val(torch.stack([splits.val[index][0] for index in range(len(splits.val))]))
    with torch.no_grad(), SpikeRecorder(network, 3) as recorder:
        predictions = network(images).mean(0).argmax(-1)
    labels = [*predictions[:5].tolist(), *((predictions[5:] + 1) % 10).tolist()]  # five of eight are right
    batch = tmp_path / "cifar-10-batches-py" / "test_batch"
    content = {**pickle.loads(batch.read_bytes(), encoding="bytes"), b"labels": labels}
    batch.write_bytes(pickle.dumps(content, protocol=2))
    assert evaluate.main(words.split()) == 0
    output = capsys.readouterr().out
    assert f"{student}: a resnet18 over 3 time steps; device cpu, amp off" in output
    assert "in training" not in output  # the file does not say
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["accuracy"] == 5 / 8
    assert found["firing_rate"] == recorder.rates()


def test_what_a_published_checkpoint_says_of_its_training_is_told(tmp_path, cifar10_root, capsys):
    path = published(tmp_path / "w.pth", "teacher/resnet18/in3/classes10", best_acc=97.25, best_epoch=290)
    words = f"{path} --arch resnet18 --dataset CIFAR10 --data_path {cifar10_root} {PLAIN}"
    assert evaluate.main(words.split()) == 0
    output = capsys.readouterr().out
    assert "a resnet18, epoch 291; device cpu" in output  # published from 0
    assert "in training: 97.25%" in output


@pytest.mark.parametrize("value", [None, "high", float("nan"), torch.zeros(2)])
def test_what_it_says_in_another_form_is_left_aside(value, tmp_path):
    path = published(tmp_path / "w.pth", "teacher/resnet18/in3/classes10", best_acc=value, best_epoch=value)
    trained = Trained(path, arch="resnet18", dataset="CIFAR10")
    assert (trained.epoch, trained.accuracy) == (None, None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dataset CIFAR10", "does not say which network it holds: describe it with --dataset, and either --stu_arch"),
        ("--stu_arch resnet18", "does not say which network it holds: "),
        ("--stu_arch resnet18 --arch resnet18 --dataset CIFAR10", "does not say which network it holds: "),
        (
            "--stu_arch resnet19 --dataset CIFAR10",
            r"does not hold a resnet19 but a resnet18 \(pass --stu_arch resnet18\): ",
        ),
        ("--arch resnet18 --dataset CIFAR10", "does not hold a resnet18 but a student, a resnet18: "),
        ("--stu_arch resnet18 --dataset DIGITS", "takes inputs of 3 channels; DIGITS has 1"),
        ("--arch resnet18 --dataset CIFAR10 --decay 0.5", "--decay is for students; .* is said to hold a teacher"),
        ("--stu_arch resnet18 --dataset CIFAR11", "--dataset must be one of .*; got 'CIFAR11'"),
        ("--stu_arch resnet18 --dataset CIFAR10 --decay 1", "decay must be at least 0 and below 1"),
        ("--stu_arch resnet18 --dataset CIFAR10 --v_reset zero", "--v_reset must be a number, or none"),
        ("--stu_arch resnet18 --dataset CIFAR10", "CIFAR10 is read from disk: say where it lies with --data_path"),
    ],
)
def test_what_the_command_must_say_of_it_is_asked_for(words, expected, student, capsys):
    assert re.search(expected, sentence(evaluate.main, capsys, student, *words.split()))


def test_a_checkpoint_of_these_trainers_is_not_described_as_another(tmp_path, capsys):
    words = f"--dataset DIGITS --num_epoch 1 --method ce --T 1 --log_path {tmp_path} --run_name own {PLAIN}"
    assert distill.main(words.split()) == 0
    capsys.readouterr()
    assert evaluate.main([f"{tmp_path}/own", "--stu_arch", "resnet8", "--dataset", "DIGITS", "--v_reset", "0"]) == 0
    line = sentence(evaluate.main, capsys, tmp_path / "own", "--stu_arch", "resnet18")
    assert f"--stu_arch is resnet18; the run in {tmp_path}/own/best.pt has resnet8." in line


def test_a_published_student_is_loaded(student, tmp_path):
    network = seal_fast.train.load(student, stu_arch="resnet18", dataset="CIFAR10", T=2, backend="torch")
    expected = filled_student("resnet18", torch.float32, num_classes=10, time_steps=2, backend="torch").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), expected(images))
    # As DataParallel names it, and without what surrounds it.
    weights = torch.load(student, weights_only=True)["best_net"]
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "bare.pth")
    bare = seal_fast.train.load(tmp_path / "bare.pth", stu_arch="resnet18", dataset="CIFAR10", T=2, backend="torch")
    with torch.no_grad():
        assert torch.equal(bare(images), expected(images))


@pytest.mark.parametrize("key", [key for key in STATE_DICTS if "classes1000" in key or "in2/classes10" in key])
def test_every_published_network_is_loaded(key, tmp_path):
    role, arch, in_channels, _ = key.split("/")
    dataset = "imagenet" if "classes1000" in key else "CIFAR10_DVS"  # the published scripts' other name
    path = published(tmp_path / "model_weights.pth", key)
    names = {"student": "stu_arch", "teacher": "arch"}
    trained = Trained(path, **{names[role]: arch, "dataset": dataset})
    assert (trained.role, f"in{trained.in_channels}") == (role, in_channels)
    network = trained.network(argparse.Namespace(**trained.options))
    assert list(network.state_dict()) == list(STATE_DICTS[key])


# The learning rate moves no weight, so a run ends with those that it began with; running statistics move.
STILL = f"--num_epoch 1 --train_batch_size 8 --lr 1e-30 --amp off {PLAIN}"


def parameters_of(network) -> dict:
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def parameters_after(folder, names) -> dict:
    state = torch.load(folder / "best.pt", weights_only=True)["best_net"]
    return {name: state[name] for name in names}


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_published_student_is_fine_tuned(student, cifar10_root, tmp_path, capsys):
    words = (
        f"--dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path} --run_name tuned --method ce --T 2 {STILL}"
    )
    assert distill.main(f"{words} --init_from {student}".split()) == 0
    assert f"--init_from: weights of {student}." in capsys.readouterr().out
    expected = parameters_of(filled_student("resnet18", torch.float32, num_classes=10))
    assert equal(parameters_after(tmp_path / "tuned", expected), expected)
    # And so is what a run of these trainers left.
    again = words.replace("tuned", "again")
    for source in (tmp_path / "tuned", tmp_path / "tuned" / "last.pt"):
        assert distill.main(f"{again} --init_from {source}".split()) == 0
        assert equal(parameters_after(tmp_path / "again", expected), expected)
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_fine_tuning_to_other_classes_starts_with_a_new_readout(role, tmp_path, capsys):
    path = published(tmp_path / "w.pth", f"{role}/resnet18/in3/classes10")
    data = makers.cifar100(tmp_path / "data", train=16)
    module = {"student": distill, "teacher": teacher}[role]
    arch = {"student": "--method ce --stu_arch resnet18 --T 1", "teacher": "--arch resnet18"}[role]
    words = f"--dataset CIFAR100 --data_path {data} --log_path {tmp_path} {arch} --seed 3 {STILL}"
    assert module.main(f"{words} --run_name run --init_from {path}".split()) == 0
    assert re.search(r"--init_from: weights of .*weight and .*bias start anew, for ", capsys.readouterr().out)
    torch.manual_seed(3)
    fresh = parameters_of({"student": models.student, "teacher": models.teacher}[role]("resnet18", num_classes=100))
    make = {"student": filled_student, "teacher": filled_teacher}[role]
    published_ones = parameters_of(make("resnet18", torch.float32, num_classes=10))
    readout = list(fresh)[-2:]
    expected = {name: fresh[name] if name in readout else published_ones[name] for name in fresh}
    assert equal(parameters_after(tmp_path / "run", fresh), expected)


@pytest.mark.parametrize("resume", ["auto", "auto --run_name run", "{tmp}/run"])
@pytest.mark.parametrize("source", ["start.pth", "source"])
def test_a_resumed_run_needs_no_file_to_start_from(
    source, resume, student, cifar10_root, tmp_path, capsys, monkeypatch
):
    start = tmp_path / ("source/best.pt" if source == "source" else source)
    start.parent.mkdir(exist_ok=True)
    start.write_bytes(student.read_bytes())
    title = "distill-CIFAR10-resnet18-ce-1" if resume == "auto" else "run"
    words = f"--dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path} --method ce --T 1 {STILL}"
    assert distill.main(f"{words} --run_name {title} --init_from {tmp_path}/{source}".split()) == 0
    as_if_stopped(tmp_path / title)
    start.unlink()
    if source == "source":
        start.parent.rmdir()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert distill.main(f"{words} --init_from {source} --resume {resume.format(tmp=tmp_path)}".split()) == 0
    output = capsys.readouterr().out
    assert "--init_from" not in output
    assert f"run folder {tmp_path}/{title}" in output


def as_if_stopped(folder):
    """Let a run of one epoch look as if it had been stopped before its first epoch ended."""
    content = torch.load(folder / "last.pt", weights_only=True)
    torch.save({**content, "epoch": 0}, folder / "last.pt")


def test_a_resumed_run_began_where_it_began(student, cifar10_root, tmp_path, capsys):
    words = f"--dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path} --method ce --T 1 {STILL}"
    folder = tmp_path / "distill-CIFAR10-resnet18-ce-1"
    assert distill.main(f"{words} --run_name {folder.name} --init_from {student}".split()) == 0
    for more, said in (
        (f"--resume {folder}", ""),
        (
            f"--resume {folder} --init_from /other",
            f"--init_from is not read: the run in {folder} began from {student}.",
        ),
        (f"--resume auto --init_from {student}", ""),
    ):
        as_if_stopped(folder)
        capsys.readouterr()
        assert distill.main(f"{words} {more}".split()) == 0
        assert said in capsys.readouterr().out
        assert json.loads((folder / "config.json").read_text())["options"]["init_from"] == str(student)
        for name in ("best.pt", "last.pt"):
            assert torch.load(folder / name, weights_only=True)["options"]["init_from"] == str(student)
    assert list(tmp_path.iterdir()) == [folder]


def test_several_ranks_start_from_the_weights_that_the_first_one_reads(student, cifar10_root, tmp_path):
    """Ranks that read other files would train other networks, without a word."""
    start = tmp_path / "start0.pth"
    start.write_bytes(student.read_bytes())
    words = (
        f"--dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path} --run_name two --method ce --T 1 {STILL}"
    )
    # A copy of the file on each rank's machine, but for the second's.
    command = [f"import os, sys; from seal_fast.train import distill; arguments = {words.split()!r}"]
    command += [f"start = {str(tmp_path)!r} + '/start' + os.environ['RANK'] + '.pth'"]
    command += ["sys.exit(distill.main([*arguments, '--init_from', start]))"]
    (tmp_path / "rank.py").write_text("; ".join(command))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, str(tmp_path / "rank.py")], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    expected = parameters_of(filled_student("resnet18", torch.float32, num_classes=10))
    assert equal(parameters_after(tmp_path / "two", expected), expected)


def test_auto_does_not_resume_a_run_from_another_start(student, cifar10_root, tmp_path):
    words = f"--dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path} --method ce --T 1 {STILL}"
    assert distill.main(f"{words} --run_name distill-CIFAR10-resnet18-ce-1".split()) == 0
    assert distill.main(f"{words} --init_from {student} --resume auto".split()) == 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--stu_arch resnet19 --init_from {student}",
            r"a resnet19 for this data but a resnet18 \(pass --stu_arch resnet18\)",
        ),
        ("--init_from {teacher}", "does not hold a resnet18 for this data but a teacher, a resnet34: "),
        ("--init_from {student}.gone", "there is no checkpoint at .*gone"),
    ],
)
def test_a_start_from_another_network_is_refused(
    words, expected, student, save_teacher, cifar10_root, tmp_path, capsys
):
    teacher = save_teacher("resnet34")
    shared = f"--dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path}/logs --method ce"
    line = sentence(distill.main, capsys, *shared.split(), *words.format(student=student, teacher=teacher).split())
    assert re.search(expected, line), line
    assert not (tmp_path / "logs").exists()
