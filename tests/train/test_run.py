"""The training loop: resuming, the loader's last batch, precision, and what is written."""

import csv

import pytest
import torch

import makers
from seal_fast.train import checkpoint, distill, engine, options, run
from seal_fast.train.options import UsageError


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Options that train in two steps of eight and seven images."""
    root = makers.cifar10(tmp_path_factory.mktemp("cifar10"), per_batch=3)
    return f"--dataset CIFAR10 --data_path {root} --train_batch_size 8 --num_workers 0 --device cpu"


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
        patch.setattr(run.plots, "plot_run", lambda folder: None)
        save = checkpoint.save

        def save_and_cut(content, path):
            if path.name == "last.pt" and content["epoch"] == 3:
                cut()  # the third epoch has been logged, but will not be saved
            save(content, path)

        patch.setattr(run.checkpoint, "save", save_and_cut)
        with pytest.raises(PowerCutError):
            distill.main(options.split())
    assert distill.main(f"{options} --resume auto".split()) == 0
    (folder,) = tmp_path.iterdir()
    expected = torch.load(finished / "last.pt", weights_only=True)
    resumed = torch.load(folder / "last.pt", weights_only=True)
    assert resumed["net"].keys() == expected["net"].keys()
    for name, value in expected["net"].items():
        assert torch.equal(resumed["net"][name], value), name
    timing = ("seconds", "images_per_second", "data_wait")
    for row, whole in zip(rows_of(folder), rows_of(finished), strict=True):
        assert {k: v for k, v in row.items() if k not in timing} == {k: v for k, v in whole.items() if k not in timing}


def test_finished_run_is_not_resumed(finished, labels_only, capsys):
    assert distill.main(f"{labels_only} --num_epoch 3 --resume {finished}".split()) == 2
    assert "already finished its 3 epochs" in capsys.readouterr().err


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


def test_last_batch_of_one_is_left_out(tmp_path):
    # 1,437 = 4·359 + 1
    args = options.resolve(
        options.teacher_parser().parse_args(["--dataset", "DIGITS", "--train_batch_size", "359"]), role="teacher"
    )
    train, val = run.loaders_of(run.splits_of(args, "teacher"), args)
    assert [len(labels) for _, labels in train] == [359] * 4
    assert sum(len(labels) for _, labels in val) == 360


def test_defaults_are_those_of_the_paper():
    def resolved(role: str, dataset: str, *words: str):
        parser = options.teacher_parser() if role == "teacher" else options.distill_parser()
        return options.resolve(parser.parse_args(["--dataset", dataset, *words]), role=role)

    student = resolved("student", "CIFAR100", "--method", "ce")
    assert (student.stu_arch, student.tea_arch, student.T, student.train_batch_size) == ("resnet18", "resnet34", 4, 128)
    assert (student.num_epoch, student.lr, student.wd, student.decay) == (300, 0.1, 5e-4, 0.5)
    assert (student.alpha, student.beta, student.temperature, student.thresh) == (0.6, 0.15, 3.0, 1.0)
    assert (student.v_reset, student.detach_reset) == (0.0, False)
    events = resolved("student", "CIFAR10_DVS_SJ", "--method", "ce", "--v_reset", "none", "--detach_reset")
    assert (events.stu_arch, events.tea_arch, events.T, events.train_batch_size) == ("resnet18", "resnet19", 10, 32)
    assert (events.v_reset, events.detach_reset) == (None, True)
    assert resolved("teacher", "CIFAR10_DVS_SJ").lr == 0.2
    imagenet = resolved("student", "imagenet", "--method", "ce")
    assert (imagenet.stu_arch, imagenet.train_batch_size, imagenet.num_epoch) == ("preact_resnet34", 512, 100)
    assert (imagenet.lr, imagenet.wd, imagenet.decay) == (0.2, 2e-5, 0.2)
    assert resolved("teacher", "imagenet").wd == 1e-4


def test_meters_weigh_batches_by_their_images():
    meters = engine.Meters(torch.device("cpu"))

    class Outcome:
        def __init__(self, loss):
            self.loss = torch.tensor(loss)
            self.parts = {"ce": torch.tensor(2 * loss)}
            self.logits = torch.eye(4).unsqueeze(0)

    meters.add(Outcome(1.0), torch.tensor([0, 1, 2, 0]))
    outcome = Outcome(4.0)
    outcome.logits = outcome.logits[:, :2]
    meters.add(outcome, torch.tensor([0, 1]))
    assert meters.read() == {"loss": 2.0, "ce": 4.0, "accuracy": 5 / 6}


def test_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 1}, path)

    def full_disk(content, partial):
        partial.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(path) == {"epoch": 1}


def test_load_names_a_missing_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"no checkpoint at .*gone\.pt"):
        checkpoint.load(tmp_path / "gone.pt")
