"""A student or teacher that the published code has trained is evaluated, fine-tuned and loaded."""

import argparse
import json
import re

import numpy as np
import pytest
import torch

import makers
import seal_fast.train
from golden import STATE_DICTS, filled_student, filled_teacher, weight
from seal_fast.train import distill, evaluate, teacher
from seal_fast.train.data import load
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
def test_a_published_student_is_evaluated(decay, student, cifar10_root, tmp_path, capsys):
    words = f"{student} --stu_arch resnet18 --dataset CIFAR10 --data_path {cifar10_root} --T 3 --amp off {PLAIN}"
    words += f" --json {tmp_path}/figures.json" + (f" --decay {decay} --thresh 0.5 --v_reset none" if decay else "")
    assert evaluate.main(words.split()) == 0
    output = capsys.readouterr().out
    assert f"{student}: a resnet18 over 3 time steps; device cpu, amp off" in output
    assert "in training" not in output  # the file does not say
    neuron = {"tau": tau_of(decay), "v_threshold": 0.5, "v_reset": None} if decay else {"tau": 2.0}
    network = filled_student("resnet18", torch.float32, num_classes=10, time_steps=3, **neuron).eval()
    splits = load("CIFAR10", cifar10_root, role="student", time_steps=3)
    images, labels = zip(*(splits.val[index] for index in range(len(splits.val))), strict=True)
    with torch.no_grad():
        hits = network(splits.finish_val(torch.stack(images))).mean(0).argmax(-1) == torch.tensor(labels)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["accuracy"] == hits.float().mean().item()
    assert 0 < sum(found["firing_rate"].values()) < len(found["firing_rate"])


def test_what_a_published_checkpoint_says_of_its_training_is_told(tmp_path, cifar10_root, capsys):
    path = published(tmp_path / "w.pth", "teacher/resnet18/in3/classes10", best_acc=97.25, best_epoch=290)
    words = f"{path} --arch resnet18 --dataset CIFAR10 --data_path {cifar10_root} {PLAIN}"
    assert evaluate.main(words.split()) == 0
    output = capsys.readouterr().out
    assert "a resnet18, epoch 290; device cpu" in output
    assert "in training: 97.25%" in output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dataset CIFAR10", "does not say which network it holds .*--stu_arch or --arch"),
        ("--stu_arch resnet18", "does not say which network it holds .*--dataset"),
        ("--stu_arch resnet19 --dataset CIFAR10", "does not hold a resnet19: "),
        ("--arch resnet18 --dataset CIFAR10", "does not hold a resnet18: "),
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


def first_weights(module, words, monkeypatch):
    """The weights from which a trainer would start, by name."""
    started = []
    monkeypatch.setattr(module, "train", lambda args, task, *rest, **options: started.append(task.network.state_dict()))
    assert module.main(words.split()) == 0
    return started[0]


def test_a_published_student_is_fine_tuned(student, cifar10_root, tmp_path, capsys):
    words = (
        f"--dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path} --run_name tuned --method ce --T 2 {PLAIN}"
    )
    words += f" --init_from {student} --num_epoch 1 --train_batch_size 20 --lr 1e-30 --amp off"
    assert distill.main(words.split()) == 0
    assert f"--init_from: weights of {student}." in capsys.readouterr().out
    expected = filled_student("resnet18", torch.float32, num_classes=10).state_dict()
    tuned = torch.load(tmp_path / "tuned" / "best.pt", weights_only=True)["best_net"]
    # The learning rate moves no weight; running statistics have moved.
    moved = [name for name, value in expected.items() if not torch.equal(tuned[name], value)]
    assert moved
    assert all("running" in name or "num_batches_tracked" in name for name in moved)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_fine_tuning_to_other_classes_starts_with_a_new_readout(role, tmp_path, monkeypatch, capsys):
    path = published(tmp_path / "w.pth", f"{role}/resnet19/in3/classes10")
    data = makers.cifar100(tmp_path / "data", train=16)
    module = {"student": distill, "teacher": teacher}[role]
    arch = {"student": "--method ce --stu_arch resnet19", "teacher": "--arch resnet19"}[role]
    words = f"--dataset CIFAR100 --data_path {data} --log_path {tmp_path}/logs {arch} {PLAIN}"
    fresh = first_weights(module, words, monkeypatch)
    started = first_weights(module, f"{words} --init_from {path}", monkeypatch)
    make = {"student": filled_student, "teacher": filled_teacher}[role]
    expected = make("resnet19", torch.float32, num_classes=10).state_dict()
    readout = list(fresh)[-2:]
    for name, value in started.items():
        assert torch.equal(value, fresh[name] if name in readout else expected[name]), name
    assert f"{readout[0]} and {readout[1]} start anew, for 100 classes." in capsys.readouterr().out


def test_a_resumed_run_needs_no_file_to_start_from(student, cifar10_root, tmp_path):
    start = tmp_path / "start.pth"
    start.write_bytes(student.read_bytes())
    words = (
        f"--dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path} --run_name run --method ce --T 1 {PLAIN}"
    )
    words += f" --init_from {start} --train_batch_size 40 --amp off"
    assert distill.main(f"{words} --num_epoch 1".split()) == 0
    config = tmp_path / "run" / "last.pt"
    content = torch.load(config, weights_only=True)
    content["options"]["num_epoch"] = 2
    torch.save(content, config)
    start.unlink()
    assert distill.main(f"{words} --num_epoch 2 --resume {tmp_path}/run".split()) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--stu_arch resnet19 --init_from {student}", "does not hold a resnet19 for 3 input channels: "),
        ("--init_from {student}.gone", "there is no checkpoint at .*gone"),
    ],
)
def test_a_start_from_another_network_is_refused(words, expected, student, cifar10_root, tmp_path, capsys):
    shared = f"--dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path}/logs --method ce"
    line = sentence(distill.main, capsys, *shared.split(), *words.format(student=student).split())
    assert re.search(expected, line), line
    assert not (tmp_path / "logs").exists()
