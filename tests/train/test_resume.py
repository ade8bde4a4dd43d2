"""--resume PATH needs no other option; a run may get more epochs."""

import csv
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from processes import Trainer
from seal_fast.train import distill, options, plots, teacher
from seal_fast.train.data import digits

FEW = 300
OPTIONS = "--dataset DIGITS --method ce --T 2 --decay 0.25 --v_reset none --device cpu --train_batch_size 64 --lr 0.05"


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    every = digits.read_digits()
    monkeypatch.setattr(digits, "read_digits", lambda: tuple(array[:FEW] for array in every))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of three epochs, with options that are none of the defaults."""
    logs = tmp_path_factory.mktemp("finished")
    trainer = Trainer(f"{OPTIONS} --num_epoch 3 --log_path {logs} --run_name run", logs / "output.txt", digits=FEW)
    assert trainer.code() == 0
    return logs / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rates_of(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["lr"]) for row in csv.DictReader(file)]


def cosine(epochs: int) -> list[float]:
    return [0.05 * (1 + math.cos(math.pi * epoch / epochs)) / 2 for epoch in range(epochs)]


@pytest.mark.parametrize("named", ["{run}", "{run}/last.pt", "."])
def test_the_options_are_the_run_s(named, run, monkeypatch):
    monkeypatch.chdir(run)
    args = options.distill_parser().parse_args(["--resume", named.format(run=run), "--T", "2"])
    saved = json.loads((run / "config.json").read_text())["options"]
    own = ("resume", "device", "num_workers", "cuda_graph", "asked", "detach_reset")
    assert {name: value for name, value in vars(args).items() if name not in own} == {
        name: value for name, value in saved.items() if name not in own
    }
    # What was asked for, and for the rest what this machine has.
    assert (args.device, args.num_workers, args.cuda_graph) == ("cpu", None, None)


def test_without_its_configuration_the_checkpoint_tells_them(run):
    (run / "config.json").write_bytes(b"")
    args = options.distill_parser().parse_args(["--resume", str(run)])
    assert (args.dataset, args.T, args.decay, args.v_reset, args.lr) == ("DIGITS", 2, 0.25, None, 0.05)


def test_a_run_goes_on_by_its_folder_alone_and_ends_as_one_that_was_not_interrupted(finished, tmp_path):
    trainer = Trainer(
        f"{OPTIONS} --num_epoch 3 --log_path {tmp_path} --run_name run --save_every 1",
        tmp_path / "first.txt",
        digits=FEW,
        dies_at=20,
    )
    assert trainer.code() != 0
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] < 3
    assert distill.main(["--resume", str(tmp_path / "run")]) == 0
    ends = [torch.load(path / "last.pt", weights_only=True)["net"] for path in (finished, tmp_path / "run")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def error_of(capsys, main, words: str) -> str:
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.split(": error: ")[1]


def test_an_option_that_contradicts_the_run_is_refused(run, capsys):
    assert "--decay was 0.25 and is 0.5" in error_of(capsys, distill.main, f"--resume {run} --decay 0.5 --num_epoch 4")
    assert "--num_epoch was 3 and is 2; it may only grow" in error_of(
        capsys, distill.main, f"--resume {run} --num_epoch 2"
    )


def test_a_default_does_not_grow_a_run(run, capsys):
    """The command that began it had --num_epoch; the one that resumes it has forgotten it."""
    words = f"{OPTIONS} --log_path {run.parent} --run_name run --resume auto"
    assert "--num_epoch was 3 and is 10" in error_of(capsys, distill.main, words)
    assert distill.main(f"{words} --num_epoch 4".split()) == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--dataset CIFAR10", "belongs to a run with other options: --dataset was DIGITS and is CIFAR10."),
        ("--method kd", "belongs to a run with other options: --method was ce and is kd."),
        ("--run_name other", "--run_name is for new runs; --resume {run} goes on in that folder."),
        ("--log_path {run}/other", "--log_path is for new runs; --resume {run} goes on in that folder."),
    ],
)
def test_what_is_given_beside_a_run_is_compared_first(given, expected, run, capsys):
    sentence = error_of(capsys, distill.main, f"--resume {run} --num_epoch 4 {given.format(run=run)}")
    assert sentence.endswith(expected.format(run=run))


def test_the_name_of_the_run_itself_may_be_given(run):
    args = options.distill_parser().parse_args(f"--resume {run} --log_path {run.parent} --run_name run".split())
    assert args.run_name == "run"


def test_an_empty_variable_names_no_run(capsys):
    assert distill.main(["--resume", ""]) == 2
    assert "--resume must be a folder, a checkpoint or 'auto'; got ''." in capsys.readouterr().err


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(run, finished, capsys):
    for name in ("last.pt", "previous.pt", "best.pt", "metrics.csv"):
        (run / name).unlink()
    assert distill.main(["--resume", str(run)]) == 0
    assert f"{run} has no checkpoint yet; its run begins anew.\n" in capsys.readouterr().out
    ends = [torch.load(path / "last.pt", weights_only=True)["net"] for path in (finished, run)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_configuration_that_holds_something_else(run):
    content = json.loads((run / "config.json").read_text())
    content["options"] |= {"asked": 5, "save_every": 5}
    (run / "config.json").write_text(json.dumps(content))
    assert distill.main(["--resume", str(run), "--num_epoch", "4"]) == 0


@pytest.mark.parametrize("dies_at", [3, 6, 7])
def test_going_on_from_the_one_before_keeps_a_whole_checkpoint_at_each_moment(dies_at, run, capsys):
    """The damaged last one must not become the one before the next."""
    whole = (run / "last.pt").read_bytes()
    (run / "previous.pt").unlink()
    (run / "previous.pt").write_bytes(whole)
    (run / "last.pt").unlink()
    (run / "last.pt").write_bytes(whole[: len(whole) // 2])
    damaged = error_of(capsys, distill.main, f"--resume {run} --num_epoch 5")
    assert damaged.endswith(f"--resume {run}/previous.pt goes on from the one before it.")
    command = f"--resume {run}/previous.pt --num_epoch 5"
    trainer = Trainer(command, run.parent / "output.txt", digits=FEW, dies_at=dies_at)
    assert trainer.code() != 0
    found = []
    for name in ("last.pt", "previous.pt"):
        try:
            found.append(torch.load(run / name, weights_only=True)["epoch"])
        except (OSError, RuntimeError):
            continue
    assert found
    assert distill.main(["--resume", str(run), "--num_epoch", "5"]) == 0


def test_a_signal_after_the_last_epoch_does_not_end_the_run_otherwise(run, monkeypatch, capsys):
    monkeypatch.setattr(plots, "plot_run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert distill.main(["--resume", str(run), "--num_epoch", "4"]) == 0
    assert "best accuracy" in capsys.readouterr().out


def test_a_student_s_run_is_not_for_the_teacher_s_trainer(run, capsys):
    sentence = error_of(capsys, teacher.main, f"--resume {run}")
    assert sentence == f"--resume: {run} is the run of a student; seal-fast-distill goes on with it."


def test_what_is_no_run(tmp_path, capsys):
    assert f"--resume: there is no checkpoint at {tmp_path}/last.pt" in error_of(
        capsys, distill.main, f"--resume {tmp_path}"
    )
    long = "n" * 300
    assert f"--resume: there is no checkpoint at {long}." in error_of(capsys, distill.main, f"--resume {long}")
    torch.save({"net": {}}, tmp_path / "last.pt")
    assert "does not say with which options its run began" in error_of(capsys, distill.main, f"--resume {tmp_path}")


def test_without_a_data_set_and_without_a_run_the_data_sets_are_named(capsys):
    sentence = error_of(capsys, distill.main, "--method ce")
    assert sentence.startswith("--dataset is needed: one of CIFAR10, ")


def test_a_finished_run_says_that_it_may_have_more_epochs(run, capsys):
    sentence = error_of(capsys, distill.main, f"--resume {run}")
    assert sentence.endswith("has finished (epoch 3 of 3); a larger --num_epoch goes on with it.")


def test_a_finished_run_gets_more_epochs(run, finished, capsys):
    assert distill.main(["--resume", str(run), "--num_epoch", "5"]) == 0
    output = capsys.readouterr().out
    rate = cosine(5)[3]
    assert f"--num_epoch grows from 3: the run becomes one of 5 epochs, from epoch 4 on with its learning rates " \
        f"({rate:.4g} at first).\n" in output  # fmt: skip
    assert rates_of(run) == pytest.approx(cosine(3) + cosine(5)[3:], rel=1e-5)  # six digits are written
    content = torch.load(run / "last.pt", weights_only=True)
    assert (content["epoch"], content["options"]["num_epoch"]) == (5, 5)
    assert content["best"]["accuracy"] >= torch.load(finished / "last.pt", weights_only=True)["best"]["accuracy"]
    # It is a run of five epochs now.
    assert "has finished (epoch 5 of 5)" in error_of(capsys, distill.main, f"--resume {run}")


def test_growing_at_once_or_after_an_interruption_is_the_same(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    assert distill.main(["--resume", str(run), "--num_epoch", "5"]) == 0
    trainer = Trainer(f"--resume {other} --num_epoch 5 --save_every 1", tmp_path / "output.txt", digits=FEW, dies_at=15)
    assert trainer.code() != 0
    assert distill.main(["--resume", str(other)]) == 0
    assert rates_of(other) == rates_of(run)
    ends = [torch.load(path / "last.pt", weights_only=True)["net"] for path in (run, other)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_run_without_a_scheduler_grows_at_its_rate(tmp_path):
    words = f"{OPTIONS} --scheduler none --log_path {tmp_path} --run_name flat --num_epoch 1"
    assert distill.main(words.split()) == 0
    assert distill.main(f"--resume {tmp_path}/flat --num_epoch 2".split()) == 0
    assert rates_of(tmp_path / "flat") == [0.05, 0.05]


def test_auto_without_a_name_takes_no_run_of_fewer_epochs(run, tmp_path):
    """Else a run that is meant to be new would have the first epochs of another schedule."""
    run.rename(tmp_path / "distill-DIGITS-resnet8-ce-1")
    words = f"{OPTIONS} --log_path {tmp_path} --num_epoch 4 --resume auto"
    assert distill.main(words.split()) == 0
    (new,) = [path for path in tmp_path.iterdir() if path.name != "distill-DIGITS-resnet8-ce-1"]
    assert rates_of(new) == pytest.approx(cosine(4), rel=1e-5)


def test_paths_of_the_data_and_the_teacher_hold_wherever_a_run_is_resumed(tmp_path, monkeypatch):
    from seal_fast.train.checks import resolve

    monkeypatch.chdir(tmp_path)
    torch.save({}, "teacher.pt")
    words = "--dataset CIFAR10 --data_path D --tea_path teacher.pt --init_from start.pt"
    args = resolve(options.distill_parser().parse_args(words.split()), role="student")
    assert (args.data_path, args.tea_path, args.init_from) == tuple(
        os.path.join(tmp_path, name) for name in ("D", "teacher.pt", "start.pt")
    )
