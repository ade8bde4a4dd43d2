"""What goes wrong on shared machines: each fault ends in one sentence and a code, and leaves whole checkpoints."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import makers
from processes import Trainer
from seal_fast.train import data
from seal_fast.train.feed import Feed
from seal_fast.train.folder import LAST, PREVIOUS

FEW = 300  # digits: 240 to train on
DIGITS = "--dataset DIGITS --device cpu --train_batch_size 32 --num_epoch 3 --save_every 1"


def run(tmp_path, options: str = "", *, logs: Path | None = None, **kwargs) -> Trainer:
    command = f"{DIGITS} --run_name run --log_path {logs or tmp_path} {options}"
    return Trainer(command, tmp_path / "output.txt", program="teacher", **{"digits": FEW, **kwargs})


def wait_for(path: Path, trainer: Trainer) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert trainer.process.is_alive(), trainer.lines()
        assert time.monotonic() < end
        time.sleep(0.005)


def error_of(trainer: Trainer, code: int) -> str:
    """Its last line, after checking that it is the only error and the exit code the promised one."""
    assert trainer.code() == code, trainer.lines()
    errors = [line for line in trainer.lines() if not line.startswith(("DIGITS:", "imagenet:", "epoch "))]
    assert len(errors) == 1, errors
    return errors[0].removeprefix("seal-fast-teacher: error: ")


def assert_whole(folder: Path) -> None:
    """The last checkpoint can be read, and its weights are finite."""
    net = torch.load(folder / LAST, weights_only=True)["net"]
    assert all(value.isfinite().all() for value in net.values())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        # Without root there is no small disk to fill; the other faults of writing are provoked without one.
        pytest.skip(f"a file system can be mounted by root only: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(small_disk, tmp_path):
    trainer = run(tmp_path, logs=small_disk)
    wait_for(small_disk / "run" / LAST, trainer)
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    assert "No space left on device" in error_of(trainer, 1)
    assert_whole(small_disk / "run")
    (small_disk / "filler").unlink()
    assert run(tmp_path, "--resume auto", logs=small_disk).code() == 0


def test_quota(tmp_path):
    """A limit of the process's files stands for a quota."""
    trainer = run(tmp_path)
    wait_for(tmp_path / "run" / LAST, trainer)
    resource.prlimit(trainer.process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert "File too large" in error_of(trainer, 1)
    assert_whole(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize("fault", ["unreadable image", "vanished folder"])
def test_data_that_is_lost_during_a_run(fault, tmp_path):
    images = makers.image_folder(tmp_path / "data")
    options = f"--dataset imagenet --data_path {images} --arch resnet8 --train_batch_size 2 --num_workers 1"
    trainer = run(tmp_path, f"{options} --num_epoch 100 --save_every 0")
    trainer.wait_for("epoch 1/100")
    if fault == "vanished folder":
        (images / "train").rename(tmp_path / "elsewhere")
        named = "train"
    else:
        named = next((images / "train").glob("*/*.JPEG"))
        named.write_bytes(named.read_bytes()[:100])
    sentence = error_of(trainer, 2)
    assert str(named) in sentence
    assert "cannot be read" in sentence
    assert_whole(tmp_path / "run")


def test_death_of_a_worker(tmp_path):
    trainer = run(tmp_path, "--num_workers 2 --num_epoch 50", digits=None)
    wait_for(tmp_path / "run" / LAST, trainer)
    first, _ = trainer.workers(2)
    os.kill(first, signal.SIGKILL)
    assert "a process that loads data died" in error_of(trainer, 1)
    assert_whole(tmp_path / "run")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_death_of_a_worker_that_hands_over_a_batch(error):
    def batches():
        yield torch.zeros(1), torch.zeros(1)
        raise error

    fed = iter(Feed(batches(), torch.device("cpu")))
    next(fed)
    with pytest.raises(RuntimeError, match=f"DataLoader worker .*{type(error).__name__}"):
        next(fed)


def test_loss_that_is_not_finite_keeps_its_batch(tmp_path):
    sentence = error_of(run(tmp_path, "--lr 1e30 --save_every 0"), 1)
    assert "epoch 1: the loss is not finite at step 2 (loss nan, ce nan)" in sentence
    kept = torch.load(tmp_path / "run" / "nonfinite.pt", weights_only=True)
    assert (kept["epoch"], kept["step"], len(kept["samples"])) == (1, 2, 32)
    assert kept["inputs"].shape == (32, 1, 8, 8)
    assert kept["inputs"].isfinite().all()
    assert len(kept["labels"]) == 32
    assert not (tmp_path / "run" / LAST).exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """After the first step they are not, but its loss was."""
    sentence = error_of(run(tmp_path, "--lr 1e30 --wd 1e30 --optim ADAMW"), 1)
    assert "weights are not finite after step 1" in sentence or "not finite at step 2" in sentence
    assert not (tmp_path / "run" / LAST).exists() or assert_whole(tmp_path / "run") is None


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run that left last.pt and previous.pt."""
    root = tmp_path_factory.mktemp("killed")
    assert run(root, dies_at=14).code() == -signal.SIGKILL
    assert (root / "run" / PREVIOUS).exists()
    return root / "run"


class Payload:
    """What a malicious pickle would run."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def spoil(path: Path, how: str, mark: Path) -> None:
    """Put something else at the place of a checkpoint."""
    content = path.read_bytes()
    path.unlink()  # not to write into the file that both names may share
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "foreign":
        torch.save({"best_net": {}}, path)
    else:
        torch.save({"net": Payload(mark)}, path)


@pytest.mark.parametrize("how", ["truncated", "foreign", "malicious"])
def test_checkpoint_that_is_no_longer_one(how, killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    last, mark = tmp_path / "run" / LAST, tmp_path / "mark"
    spoil(last, how, mark)
    refused = error_of(run(tmp_path, f"--resume {last}"), 2)
    assert f"checkpoint {last} is " in refused
    trainer = run(tmp_path, "--resume auto")
    assert trainer.code() == 0
    why = refused.partition(" --resume ")[0]  # what helps is done here
    assert trainer.lines()[0] == f"{why} Going on from {tmp_path}/run/{PREVIOUS}."
    assert (tmp_path / "run" / f"{LAST}.refused").exists()
    assert not mark.exists()
    assert_whole(tmp_path / "run")


def test_both_checkpoints_are_of_no_use(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    for name in (LAST, PREVIOUS):
        spoil(tmp_path / "run" / name, "truncated", tmp_path)
    assert f"{LAST} is truncated" in error_of(run(tmp_path, "--resume auto"), 2)


@pytest.mark.parametrize("array", ["labels.npy", "frames.npy"])
def test_malicious_frame_cache_is_refused(array, tmp_path):
    root, mark = tmp_path / "data", tmp_path / "mark"
    makers.cifar10_dvs(root, per_class=1)
    load = {"name": "CIFAR10_DVS_SJ", "root": root, "role": "student", "time_steps": 2}
    data.load(**load)
    (path,) = root.glob(f"*/*/{array}")
    np.save(path, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(data.DataError, match="incomplete or was changed"):
        data.load(**load)
    assert not mark.exists()


def test_malicious_teacher_is_refused(tmp_path):
    """Through the command line, in a process of its own; and the payload does leave its mark where it is trusted."""
    mark, path = tmp_path / "mark", tmp_path / "teacher.pt"
    torch.save({"best_net": Payload(mark)}, path)
    options = f"{DIGITS} --tea_path {path} --log_path {tmp_path}"
    trainer = Trainer(options, tmp_path / "output.txt", program="distill")
    assert trainer.code() == 2
    assert "is refused" in trainer.lines()[-1]
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_vanished_frame_cache(tmp_path):
    root = tmp_path / "data"
    makers.cifar10_dvs(root, per_class=1)
    splits = data.load("CIFAR10_DVS_SJ", root, role="student", time_steps=2)
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(data.DataError, match=r"frames\.npy cannot be read: no such file or directory"):
        splits.train[0]
