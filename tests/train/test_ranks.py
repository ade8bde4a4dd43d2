"""Several ranks train as one process does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import processes
from seal_fast.models import student, teacher
from seal_fast.train import ranks
from seal_fast.train.batches import Batches, Seeded
from seal_fast.train.engine import evaluate, train_epoch
from seal_fast.train.errors import UsageError
from seal_fast.train.feed import Feed
from seal_fast.train.run import optimizer_of
from seal_fast.train.step import Step
from seal_fast.train.tasks import DistillTask, TeacherTask

CPU = torch.device("cpu")
BATCH, STEPS = 8, 20
FEW = 300  # digits: 240 to train on


class Noisy(Dataset):
    """Digits in float64 whose augmentation is noise."""

    def __init__(self, count: int):
        from seal_fast.train.data.digits import read_digits

        images, labels = (torch.from_numpy(array[:count]) for array in read_digits())
        self.images, self.labels = images.double().unsqueeze(1) / 16, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] + 0.1 * torch.randn(1, 8, 8, dtype=torch.float64), int(self.labels[index])


def train(kind: str, parts: int, path: Path):
    """Twenty steps in float64, the last on five images, and an evaluation; the first rank saves what came out."""
    torch.manual_seed(0)
    ann = teacher("resnet8", num_classes=10, in_channels=1).double()
    if kind == "teacher":
        task = TeacherTask(ann)
    else:
        network = student("resnet8", num_classes=10, in_channels=1, time_steps=2).double()
        options = {"alpha": 0.6, "beta": 0.15, "temperature": 3.0, "backend": "auto"}
        task = DistillTask(network, ann.eval().requires_grad_(False), method="seal", **options)
    task.parallel = ranks.parallel(task.network)
    args = type("Args", (), {"optim": "SGDM", "lr": 0.1, "wd": 5e-4})
    optimizer = optimizer_of(task.network, args, spiking=kind != "teacher")
    among = {"rank": ranks.rank(), "ranks": ranks.size()}
    data = Seeded(Noisy(BATCH * STEPS - 3))
    batches = Batches(len(data), BATCH, seed=1, parts=parts, smallest=2, **among)
    assert batches.steps == STEPS
    step = Step(task, optimizer, torch.amp.GradScaler("cpu", enabled=False), device=CPU, amp="off")
    feed = Feed(DataLoader(data, batch_sampler=batches), CPU)
    means = train_epoch(step, feed, batches, title="", epochs_left=0)
    val = Batches(len(data), 33, **among)
    result = evaluate(task, Feed(DataLoader(data, batch_sampler=val), CPU), device=CPU, amp="off")
    if ranks.first():
        figures = {**{name: means[name] for name in ("loss", "ce", "accuracy")}, "val": result["accuracy_at"]}
        figures["rates"] = result["firing_rate"]
        torch.save({"net": task.network.state_dict(), "figures": figures}, path)


@pytest.mark.parametrize(("kind", "parts"), [("seal", 1), ("seal", 2), ("teacher", 1)])
def test_two_ranks_take_the_steps_of_one_process(kind, parts, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        train(kind, parts, tmp_path / "one.pt")
    finally:
        torch.set_num_threads(threads)
    processes.in_ranks(train, 2, kind, parts, tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one["net"].keys() == two["net"].keys()
    errors = {name: (value - two["net"][name]).abs().max().item() for name, value in one["net"].items()}
    assert max(errors.values()) < 1e-9, errors  # measured 2e-15 in the student, 6e-14 in the teacher
    for name in ("loss", "ce", "accuracy"):
        assert two["figures"][name] == pytest.approx(one["figures"][name], rel=1e-9), name
    assert two["figures"]["val"] == one["figures"]["val"]
    assert two["figures"]["rates"] == pytest.approx(one["figures"]["rates"], rel=1e-9)


def options(tmp_path, name: str) -> str:
    return (
        f"--dataset DIGITS --method ce --T 2 --device cpu --num_epoch 3 --train_batch_size 32 --save_every 1 "
        f"--log_path {tmp_path} --run_name {name}"
    )


def test_a_rank_killed_under_torchrun_is_started_again_and_the_run_ends_in_the_same_place(tmp_path):
    port = processes.free_port()
    whole = [
        processes.Trainer(
            options(tmp_path, "whole"), tmp_path / f"{n}.txt", digits=FEW, environment=processes.rank(n, 2, port)
        )
        for n in range(2)
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max_restarts", "1", "--monitor_interval", "0.1", processes.__file__, "distill", str(FEW)]
    with (tmp_path / "torchrun.txt").open("w") as output:
        torchrun = subprocess.Popen(
            [*command, *options(tmp_path, "killed").split()], stdout=output, stderr=subprocess.STDOUT
        )
        last = tmp_path / "killed" / "last.pt"
        end = time.monotonic() + 120
        while not last.exists():
            assert torchrun.poll() is None, (tmp_path / "torchrun.txt").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(second_rank(torchrun.pid), signal.SIGKILL)
        assert torchrun.wait(120) == 0, (tmp_path / "torchrun.txt").read_text()
    assert [trainer.code() for trainer in whole] == [0, 0]
    lines = (tmp_path / "torchrun.txt").read_text()
    assert "epochs 1 to 3, after" in lines or "epochs 2 to 3" in lines or "epochs 3 to 3" in lines, lines
    ends = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed")]
    assert all(torch.equal(value, ends[1]["net"][name]) for name, value in ends[0]["net"].items())
    # One rank prints.
    assert whole[1].lines() == []
    assert sum(line.startswith("epoch ") for line in whole[0].lines()) == 3


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, ranks.SyncBatchNormOnCpu])
def test_batch_norms_of_every_dimension_are_synchronised(kind):
    def norms():
        options = {"eps": 0.25, "momentum": None}
        return [nn.BatchNorm1d(4, **options), nn.BatchNorm2d(4, **options), nn.BatchNorm3d(4, **options)]

    network, others = nn.Sequential(*norms(), nn.Sequential(*norms())), norms()
    ranks.synchronise(network, kind)
    found = [*network[:3], *network[3]]
    assert [type(module) for module in found] == [kind] * 6
    assert {(module.eps, module.momentum) for module in found} == {(0.25, None)}
    for module, other in zip(found, others * 2, strict=True):
        assert module.state_dict().keys() == other.state_dict().keys()


def test_one_gpu_is_no_device_for_several_ranks(monkeypatch):
    for name, value in processes.rank(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    assert ranks.own_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="--device 'cuda:0' names one GPU for all ranks"):
        ranks.own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="torchrun started 2 processes here, where there are 1 GPUs"):
        ranks.own_device("cuda")


TORCHRUN = processes.rank(0, 2, 29500)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"RANK": None}, "WORLD_SIZE is 2, but RANK is not set: start several processes with torchrun, or unset"),
        ({"LOCAL_RANK": None}, "WORLD_SIZE is 2, but LOCAL_RANK is not set"),
        ({"LOCAL_WORLD_SIZE": ""}, "WORLD_SIZE is 2, but LOCAL_WORLD_SIZE is not set"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is 2, but MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number at least 1; got 'two': torchrun sets it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number at least 1; got '0'"),
        ({"RANK": "2"}, "RANK must be a whole number from 0 to 1; got '2'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number from 0 to 1; got '-1'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number from 0 to 65535; got 'http'"),
    ],
    ids=str,
)
def test_variables_that_torchrun_would_set_are_checked(changes, expected, monkeypatch):
    for name, value in {**TORCHRUN, **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=expected):
        ranks.check_environment()


def test_a_variable_that_is_missing_ends_a_trainer_before_anything_starts(tmp_path):
    trainer = processes.Trainer(
        f"{options(tmp_path / 'logs', 'run')}", tmp_path / "output.txt", environment={"WORLD_SIZE": "2"}
    )
    assert trainer.code() == 2
    (line,) = trainer.lines()
    assert line.startswith("seal-fast-distill: error: WORLD_SIZE is 2, but RANK is not set: ")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_needs_no_variables(size, monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    ranks.check_environment()


def second_rank(torchrun: int) -> int:
    """The process of torchrun's second rank."""
    for child in processes.children(torchrun):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if b"RANK=1" in variables:
            return child
    raise AssertionError("torchrun has started no second rank")
