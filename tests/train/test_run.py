"""The training loop: resuming, the loader's last batch, precision, and what is written."""

import csv
import json
import math
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import makers
from seal_fast.backends import _MISSING, _resolve_once
from seal_fast.models import student
from seal_fast.train import checks, data, defaults, distill, folder, options, plots, run


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Options that train in two steps of eight and seven images."""
    root = makers.cifar10(tmp_path_factory.mktemp("cifar10"), per_batch=3)
    return f"--dataset CIFAR10 --data_path {root} --train_batch_size 8 --num_workers 1 --device cpu"


@pytest.fixture(scope="module")
def labels_only(images) -> str:
    return f"{images} --method ce --T 2"


def rows_of(folder) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(labels_only, tmp_path_factory):
    """A run of three epochs."""
    logs = tmp_path_factory.mktemp("finished")
    assert distill.main(f"{labels_only} --log_path {logs} --run_name whole --num_epoch 3".split()) == 0
    return logs / "whole"


def test_resumed_run_ends_as_an_uninterrupted_one(finished, labels_only, tmp_path, monkeypatch):
    options = f"{labels_only} --log_path {tmp_path} --num_epoch 3"

    class PowerCutError(Exception):
        pass

    def cut(*args, **kwargs):
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(plots, "plot_run", lambda folder, best: None)
        save = folder.Run.save

        def save_and_cut(self, content):
            if content["epoch"] == 3:
                cut()  # the third epoch has been logged, but will not be saved
            save(self, content)

        patch.setattr(folder.Run, "save", save_and_cut)
        with pytest.raises(PowerCutError):
            distill.main(options.split())
    assert distill.main(f"{options} --resume auto".split()) == 0
    (own,) = tmp_path.iterdir()
    expected = torch.load(finished / "last.pt", weights_only=True)
    resumed = torch.load(own / "last.pt", weights_only=True)
    assert resumed["net"].keys() == expected["net"].keys()
    for name, value in expected["net"].items():
        assert torch.equal(resumed["net"][name], value), name
    timing = ("seconds", "images_per_second", "data_wait")
    for row, whole in zip(rows_of(own), rows_of(finished), strict=True):
        assert {k: v for k, v in row.items() if k not in timing} == {k: v for k, v in whole.items() if k not in timing}


def test_resume_with_other_options_is_refused_and_leaves_the_run_alone(finished, labels_only, capsys):
    before = (finished / "config.json").read_bytes()
    for option, sentence in (
        ("--wd 0.1", "--wd was 0.0005 and is 0.1"),
        ("--optim ADAM", "--optim was SGDM and is ADAM"),
    ):
        assert distill.main(f"{labels_only} --num_epoch 3 {option} --resume {finished}".split()) == 2
        assert sentence in capsys.readouterr().err
    assert (finished / "config.json").read_bytes() == before


def test_auto_resumes_the_named_run_or_one_with_the_same_options_or_none(labels_only, tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(distill, "train", lambda args, task, splits, run, spiking: folders.append(run.resumed))

    def auto(more: str):
        assert distill.main(f"{labels_only} --log_path {tmp_path} --resume auto {more}".split()) == 0
        return folders.pop()

    args = options.distill_parser().parse_args(f"{labels_only} --log_path {tmp_path}".split())
    saved = vars(checks.resolve(args, role="student"))
    for name in ("distill-CIFAR10-resnet18-ce-1", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
        (tmp_path / name / "config.json").write_text(json.dumps({"options": saved}))
    assert auto("") == tmp_path / "distill-CIFAR10-resnet18-ce-1" / "last.pt"
    assert auto("--run_name mine") == tmp_path / "mine" / "last.pt"
    assert auto("--run_name other") is None
    assert auto("--seed 7") is None


def test_same_seed_gives_the_same_student_whatever_the_method(images, save_teacher, tmp_path, monkeypatch):
    first = []

    def keep(args, task, splits, run, spiking):
        first.append({name: value.clone() for name, value in task.network.state_dict().items()})

    monkeypatch.setattr(distill, "train", keep)
    path = save_teacher("resnet18")
    for method in ("ce", "seal"):
        command = f"{images} --method {method} --tea_arch resnet18 --tea_path {path} --log_path {tmp_path}"
        assert distill.main(command.split()) == 0
    assert all(torch.equal(value, first[1][name]) for name, value in first[0].items())


def test_learning_rate_is_a_cosine_to_zero_over_the_epochs(finished):
    rates = [float(row["lr"]) for row in rows_of(finished)]
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)], rel=1e-5)


def test_tensorboard_holds_what_the_csv_holds(finished):
    events = EventAccumulator(str(finished)).Reload()
    for name in ("train_loss", "val_accuracy", "firing_rate/lif0"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([float(row[name]) for row in rows_of(finished)], rel=1e-5), name


def test_configuration_names_the_commit(finished):
    commit = json.loads((finished / "config.json").read_text())["environment"]["commit"]
    head = subprocess.run(
        ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    assert (commit or "").removesuffix("-dirty") == head


def test_finished_run_is_not_resumed(finished, labels_only, capsys):
    assert distill.main(f"{labels_only} --num_epoch 3 --resume {finished}".split()) == 2
    assert "has finished (epoch 3 of 3)" in capsys.readouterr().err


def test_run_is_not_overwritten(finished, labels_only, capsys):
    assert distill.main(f"{labels_only} --log_path {finished.parent} --run_name whole".split()) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_resume_from_another_kind_of_checkpoint(finished, labels_only, capsys):
    assert distill.main(f"{labels_only} --resume {finished}/best.pt".split()) == 2
    assert "is not the last.pt of a run" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["seal", "ela", "sta", "kd", "tdkd", "ce"])
def test_each_method_logs_its_terms_and_their_sum(method, images, tmp_path, save_teacher):
    path = save_teacher("resnet18")
    options = f"{images} --T 2 --method {method} --tea_arch resnet18 --tea_path {path} --num_epoch 1"
    assert distill.main(f"{options} --log_path {tmp_path} --run_name student".split()) == 0
    (row,) = rows_of(tmp_path / "student")
    parts = {name for name in row if name.startswith("train_")} - {"train_loss", "train_accuracy"}
    terms = {"seal": {"ela", "sta"}, "ela": {"ela"}, "sta": {"sta"}, "kd": {"kd"}, "tdkd": {"kd", "kd_correct"}}
    assert parts == {"train_ce", *(f"train_{term}" for term in terms.get(method, ()))}
    weights = {"ela": 0.6, "kd": 0.6, "sta": 0.15, "kd_correct": 0.15, "ce": 1.0}
    total = sum(weights[name.removeprefix("train_")] * float(row[name]) for name in parts)
    assert float(row["train_loss"]) == pytest.approx(total, rel=1e-4)  # six digits are written
    assert row["val_accuracy"] == row["val_accuracy_t2"]


@pytest.mark.parametrize(
    "more",
    [
        "--amp bf16",
        pytest.param("--amp fp16", marks=pytest.mark.long),  # 87 s: CPUs emulate float16 convolutions
        "--optim ADAM --lr 0.001",
        "--optim ADAMW --lr 0.001",
    ],
)
def test_precisions_and_optimisers_train(more, labels_only, tmp_path):
    assert distill.main(f"{labels_only} {more} --num_epoch 1 --log_path {tmp_path} --run_name run".split()) == 0
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["best_net"]
    assert all(value.dtype in (torch.float32, torch.int64) for value in best.values())
    assert best["conv0.1.num_batches_tracked"] == 2  # both steps have been taken


@pytest.mark.parametrize(
    ("T", "installed", "chosen"), [(64, "triton", "triton"), (65, "triton", "torch"), (65, "cupy", "cupy")]
)
def test_the_loss_runs_on_kernels_that_take_so_many_time_steps(T, installed, chosen, monkeypatch):
    monkeypatch.delenv("SEAL_FAST_BACKEND", raising=False)
    for name in ("triton", "cupy"):
        monkeypatch.setitem(_MISSING, name, "" if name == installed else "it is not installed")
    _resolve_once.cache_clear()
    try:
        found = checks.kernels_of(Namespace(device="cuda", backend="auto", T=T))
    finally:
        _resolve_once.cache_clear()
    assert found == {"lif": installed, "bn_lif": installed, "seal_loss": chosen}


FAST = {"device": "cuda:0", "amp": "bf16", "accumulate": 1, "backend": "auto"}


@pytest.mark.parametrize(
    ("changed", "captured"),
    [
        ({}, True),
        ({"backend": "cupy"}, True),
        ({"device": "cpu"}, False),
        ({"amp": "off"}, False),  # torch computes as published
        ({"amp": "fp16"}, False),  # its scaler skips steps
        ({"accumulate": 2}, False),
        ({"backend": "torch"}, False),
    ],
    ids=str,
)
def test_steps_are_captured_by_default_where_they_can_be(changed, captured):
    assert checks.graph_by_default(Namespace(**{**FAST, **changed})) == captured


def test_steps_are_captured_where_nobody_asked_only_by_default(monkeypatch):
    words = ["--dataset", "CIFAR10", "--method", "ce", "--device", "cpu"]
    parse = options.distill_parser().parse_args
    assert checks.resolve(parse(words), role="student").cuda_graph is False
    monkeypatch.setattr(checks, "graph_by_default", lambda args: True)
    assert checks.resolve(parse(words), role="student").cuda_graph is True
    assert checks.resolve(parse([*words, "--cuda_graph", "false"]), role="student").cuda_graph is False


def test_last_batch_of_one_is_left_out(tmp_path):
    # 1,437 = 4·359 + 1
    args = checks.resolve(
        options.teacher_parser().parse_args(["--dataset", "DIGITS", "--train_batch_size", "359"]), role="teacher"
    )
    train, val = run.loaders_of(run.splits_of(args, "teacher"), args)
    assert [len(labels) for _, labels, _ in train] == [359] * 4
    assert sum(len(labels) for _, labels, _ in val) == 360


def test_defaults_that_no_published_command_says():
    words = "--dataset CIFAR10 --method ce"
    args = checks.resolve(options.distill_parser().parse_args(words.split()), role="student")
    assert (args.seed, args.temperature, args.thresh, args.v_reset, args.detach_reset) == (60, 3.0, 1.0, 0.0, False)
    assert (args.optim, args.scheduler) == ("SGDM", "COSINE")
    events = checks.resolve(options.teacher_parser().parse_args(["--dataset", "CIFAR10_DVS"]), role="teacher")
    assert (events.dataset, events.train_batch_size, events.val_batch_size) == ("CIFAR10_DVS_SJ", 128, 128)


def test_every_dataset_has_defaults():
    assert set(defaults.DEFAULTS) == set(data.DATASETS)


def test_soft_reset_and_detached_reset():
    words = "--dataset CIFAR10_DVS_SJ --method ce --v_reset none --detach_reset"
    args = checks.resolve(options.distill_parser().parse_args(words.split()), role="student")
    assert (args.v_reset, args.detach_reset) == (None, True)


def test_a_run_starts_from_the_weights_that_the_published_script_starts_from(images, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(distill, "train", lambda args, task, *rest, **more: started.append(task.network.state_dict()))
    assert distill.main(f"{images} --method ce --log_path {tmp_path}".split()) == 0
    torch.manual_seed(60)
    expected = student("resnet18", num_classes=10).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in started[0].items())


def test_learning_rate_is_constant_without_a_scheduler(labels_only, tmp_path):
    words = f"{labels_only} --log_path {tmp_path} --run_name flat --num_epoch 2 --scheduler none --lr 0.05"
    assert distill.main(words.split()) == 0
    assert [float(row["lr"]) for row in rows_of(tmp_path / "flat")] == [0.05, 0.05]


def test_the_first_of_equal_epochs_is_the_best(labels_only, tmp_path):
    # Nothing is learned, so epochs are equal.
    words = f"{labels_only} --log_path {tmp_path} --run_name still --num_epoch 3 --lr 1e-30"
    assert distill.main(words.split()) == 0
    accuracies = [float(row["val_accuracy"]) for row in rows_of(tmp_path / "still")]
    highest = [epoch for epoch, accuracy in enumerate(accuracies, start=1) if accuracy == max(accuracies)]
    assert len(highest) > 1
    assert torch.load(tmp_path / "still" / "best.pt", weights_only=True)["epoch"] == highest[0]


def test_the_plot_names_the_epoch_that_is_kept(finished, tmp_path, monkeypatch):
    """Of equal ones the trainer knows which; what the CSV rounds to be equal is not compared again."""
    shutil.copy(finished / "metrics.csv", tmp_path)
    labels = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: labels.extend(axis_labels(figure)))
    plots.plot_run(tmp_path, 2)
    assert "best epoch (2)" in labels
    assert "last epoch" in labels


def axis_labels(figure) -> list[str]:
    return [line.get_label() for axis in figure.axes for line in axis.lines]


def test_the_plot_is_told_the_best_epoch(labels_only, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(plots, "plot_run", lambda folder, best: told.append(best))
    words = f"{labels_only} --log_path {tmp_path} --run_name still --num_epoch 2 --lr 1e-30"
    assert distill.main(words.split()) == 0
    assert told == [torch.load(tmp_path / "still" / "best.pt", weights_only=True)["epoch"]]
