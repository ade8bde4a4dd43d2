"""Runs that are killed, terminated or interrupted, and go on."""

import csv
import os
import random
import signal
import time

import pytest
import torch

from processes import Trainer

TIMING = ("seconds", "images_per_second", "data_wait")
FEW = 300  # digits: 240 to train on, in eight steps


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> str:
    """A distillation of three epochs that saves after each step."""
    from seal_fast.models import teacher

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"best_net": teacher("resnet8", num_classes=10, in_channels=1).state_dict()}, path)
    return f"--dataset DIGITS --tea_path {path} --T 2 --device cpu --num_epoch 3 --train_batch_size 32 --save_every 1"


def run(options: str, tmp_path, name: str, **kwargs) -> Trainer:
    command = f"{options} --log_path {tmp_path} --run_name {name} --resume auto"
    return Trainer(command, tmp_path / f"{name}.txt", **kwargs)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run without interruption: its folder, and its seconds from the first line on."""
    root = tmp_path_factory.mktemp("whole")
    trainer = run(options, root, "whole", digits=FEW)
    trainer.wait_for("run folder")
    start = time.monotonic()
    assert trainer.code() == 0, trainer.lines()
    return root / "whole", time.monotonic() - start


def assert_equal(folder, expected) -> None:
    """Everything that is left of two runs is equal, bit for bit, but for times."""
    both = [torch.load(path / "last.pt", weights_only=True) for path in (folder, expected)]
    assert both[0]["epoch"] == both[1]["epoch"]
    for part in ("net", "optimizer", "scheduler"):
        assert_same(both[0][part], both[1][part], part)
    names = [{path.name.partition(".out.tfevents.")[0] for path in place.iterdir()} for place in (folder, expected)]
    assert names[0] == names[1]  # each start has TensorBoard events of its own, and nothing else is left behind
    rows = []
    for path in (folder, expected):
        with open(path / "metrics.csv", newline="") as file:
            rows.append([{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]


def assert_same(one, other, what: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), what
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), what
        for key in one:
            assert_same(one[key], other[key], f"{what}.{key}")
    elif isinstance(one, list):
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{what}.{index}")
    else:
        assert one == other, what


def kill(options, tmp_path, moments, seconds: float, **kwargs) -> None:
    """Start and kill a run at each moment, then let it end."""
    for moment in moments:
        if moment == "inside a save":
            trainer = run(options, tmp_path, "killed", dies_at=random.randrange(2, 24), **kwargs)
        else:
            trainer = run(options, tmp_path, "killed", **kwargs)
            trainer.wait_for("run folder")
            time.sleep(random.uniform(0, seconds))
            trainer.send(signal.SIGKILL)
        assert trainer.code() == -signal.SIGKILL, trainer.lines()
    trainer = run(options, tmp_path, "killed", **kwargs)
    assert trainer.code() == 0, trainer.lines()


def test_killed_three_times_the_weights_are_equal_bit_for_bit(options, whole, tmp_path):
    folder, seconds = whole
    kill(options, tmp_path, ["inside a save", "any", "inside a save"], seconds / 6, digits=FEW)
    assert_equal(tmp_path / "killed", folder)


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_ten_times_the_weights_are_equal_bit_for_bit(workers, options, tmp_path):
    options = f"{options} --num_workers {workers} --train_batch_size 64"
    trainer = run(options, tmp_path, "whole")
    trainer.wait_for("run folder")
    start = time.monotonic()
    assert trainer.code(300) == 0
    kill(options, tmp_path, ["any", "inside a save"] * 5, (time.monotonic() - start) / 12)
    assert_equal(tmp_path / "killed", tmp_path / "whole")


def test_neither_worker_processes_nor_a_resume_inside_an_epoch_change_a_run(options, whole, tmp_path):
    """SIGTERM to the whole process group, as schedulers send it; the workers outlive it until the step is done."""
    trainer = run(f"{options} --num_workers 2", tmp_path, "terminated", digits=FEW)
    trainer.wait_for("run folder")
    for child in trainer.workers(2):
        os.kill(child, signal.SIGTERM)
    trainer.send(signal.SIGTERM)
    assert trainer.code() == 75
    assert "stopped by SIGTERM" in trainer.lines()[-1]
    saved = torch.load(tmp_path / "terminated" / "last.pt", weights_only=True)
    assert saved["step"] > 0
    assert run(options, tmp_path, "terminated", digits=FEW).code() == 0
    assert_equal(tmp_path / "terminated", whole[0])


def test_ctrl_c_saves_and_a_second_one_ends_at_once(options, tmp_path):
    trainer = run(options.replace("--save_every 1", "--save_every 0"), tmp_path, "once", digits=FEW)
    trainer.wait_for("run folder")
    trainer.send(signal.SIGINT)
    assert trainer.code() == 130
    assert "stopped by Ctrl-C" in trainer.lines()[-1]
    assert torch.load(tmp_path / "once" / "last.pt", weights_only=True)["step"] > 0

    trainer = run(f"{options} --train_batch_size 1400", tmp_path, "twice")  # one long step
    trainer.wait_for("run folder")
    trainer.send(signal.SIGINT)
    trainer.wait_for("Ctrl-C again ends at once")
    trainer.send(signal.SIGINT)
    assert trainer.code() == 130
    assert "interrupted" in trainer.lines()[-1]
    assert not (tmp_path / "twice" / "last.pt").exists()
