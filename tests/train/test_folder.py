"""A run's folder belongs to one start at a time, and to the run that began in it."""

import argparse
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

import processes
from processes import Trainer
from seal_fast.train import folder, ranks
from seal_fast.train.errors import UsageError
from seal_fast.train.resume import find

FEW = 300  # digits: 240 to train on, in eight steps
OPTIONS = "--dataset DIGITS --device cpu --train_batch_size 32 --save_every 1"


def start(tmp_path, options: str, output: str = "output.txt", **more) -> Trainer:
    command = f"{OPTIONS} --log_path {tmp_path}/logs {options}"
    return Trainer(command, tmp_path / output, program="teacher", **{"digits": FEW, **more})


def test_processes_that_start_in_one_second_get_folders_of_their_own(tmp_path):
    """As in two containers: nothing in the name tells them apart."""
    made, together = [], threading.Barrier(8)

    def make():
        together.wait()
        made.append(folder._make(tmp_path, "title"))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8
    assert sorted(made) == sorted(tmp_path.iterdir())


def test_two_unnamed_runs_at_once_end_in_two_folders(tmp_path):
    trainers = [start(tmp_path, "--num_epoch 1", f"{number}.txt") for number in range(2)]
    assert [trainer.code() for trainer in trainers] == [0, 0]
    assert len(list((tmp_path / "logs").iterdir())) == 2


@pytest.mark.parametrize(
    ("second", "flag"),
    [
        ("--run_name run", "--run_name"),
        ("--run_name run --resume auto", "--run_name"),
        ("--resume {run}", "--resume"),
        ("--resume {run}/last.pt", "--resume"),
    ],
)
def test_a_second_start_ends_with_2_and_the_first_goes_on(second, flag, tmp_path):
    run = tmp_path / "logs" / "run"
    first = start(tmp_path, "--run_name run --num_epoch 4")
    if "resume" in second:
        first.wait_for("epoch 1/4: ")
    else:
        first.wait_for("run folder")
    os.kill(first.process.pid, signal.SIGSTOP)  # it would end before the second has come that far
    try:
        before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
        late = start(tmp_path, f"{second.format(run=run)} --num_epoch 4", "second.txt")
        assert late.code() == 2
        used = f"{run} is used by process {first.process.pid} on "
        assert f"seal-fast-teacher: error: {flag}: {used}" in late.lines()[-1]
        assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert first.code() == 0
    assert not (run / folder.LOCK).exists()


def test_the_lock_is_free_at_once_after_a_kill_though_processes_that_load_data_live_on(tmp_path):
    first = start(tmp_path, "--run_name run --num_epoch 100 --num_workers 2")
    first.wait_for("epoch 1/100: ")
    workers = first.workers(2)
    try:
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # they would see soon that they are alone
        first.send(signal.SIGKILL)
        assert first.code() == -signal.SIGKILL
        run = tmp_path / "logs" / "run"
        assert (run / folder.LOCK).exists()
        (run / "best.pt.partial").write_bytes(b"half")
        second = start(tmp_path, f"--resume {run} --num_workers 0 --num_epoch 100", "second.txt")
        second.wait_for("epoch 2/100: ")
        second.send(signal.SIGTERM)
        assert second.code() == 75, second.lines()
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    assert [path.name for path in run.iterdir() if path.name.startswith(".") or path.suffix == ".partial"] == []


def arguments(tmp_path, **options) -> argparse.Namespace:
    return argparse.Namespace(**{"log_path": str(tmp_path), "run_name": None, "resume": None, **options})


@pytest.fixture
def restarted(monkeypatch):
    """torchrun has started this process again."""
    for name, value in processes.rank(0, 1, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")


def begun(path: Path, by: str) -> Path:
    path.mkdir(parents=True)
    (path / folder.LAST).touch()
    (path / "config.json").write_text(json.dumps({"options": {}, "started_by": by}))
    return path


def test_a_process_that_is_started_again_takes_the_run_that_it_began_and_no_other(tmp_path, restarted):
    begun(tmp_path / "title-1", ranks.started_by())
    begun(tmp_path / "title-2", ranks.started_by().replace("tick", "tick 1"))  # of a container, with equal numbers
    os.utime(tmp_path / "title-2" / folder.LAST, (2e9, 2e9))
    assert find(arguments(tmp_path), "title") == (tmp_path / "title-1", tmp_path / "title-1" / folder.LAST)
    assert find(arguments(tmp_path), "another") == (None, None)


def test_a_name_that_another_run_has_is_refused_after_a_restart_too(tmp_path, restarted):
    begun(tmp_path / "name", "somebody else")
    with pytest.raises(UsageError, match=r"--run_name: .*name already holds a run"):
        folder.Run(arguments(tmp_path, run_name="name"), "title")


def test_what_ended_before_its_first_checkpoint_begins_again_in_its_folder(tmp_path, restarted):
    (begun(tmp_path / "title-1", ranks.started_by()) / folder.LAST).unlink()
    assert find(arguments(tmp_path), "title") == (tmp_path / "title-1", None)


def test_starts_are_told_apart(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    own = ranks.started_by()
    assert own == ranks.started_by()
    assert own.startswith(f"process {os.getpid()} on ")
    assert "unknown" not in own
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert f"process {os.getppid()} on " in ranks.started_by()
    for name, value in {"TORCHELASTIC_RUN_ID": "job", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.started_by() == "torchrun job"  # whichever machine has the first rank


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"run_name": "n" * 300}, "--run_name: no run can be in .*: File name too long"),
        ({"log_path": "{tmp}/new", "run_name": "n" * 300}, "--run_name: no run can be in .*: File name too long"),
        ({"log_path": "{tmp}/file"}, "--log_path: no run can be in .*: .*file is no folder"),
        ({"log_path": "{tmp}/file/runs"}, "--log_path: no run can be in .*: .*file is no folder"),
        ({"log_path": "{tmp}/loop/runs", "run_name": "name"}, "--run_name: no run can be in .*symbolic links"),
    ],
)
def test_a_place_where_no_run_can_be_is_told_before_anything_starts(options, expected, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    options = {name: value.format(tmp=tmp_path) for name, value in options.items()}
    with pytest.raises(UsageError, match=expected):
        folder.check_place(arguments(tmp_path, **options))


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UsageError, match=f"--log_path: no run can be in {tmp_path}/a/b: {tmp_path} cannot be written"):
        folder.check_place(arguments(tmp_path, log_path=f"{tmp_path}/a/b"))


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "name" / folder.LOCK).mkdir(parents=True)
    (tmp_path / "name" / "x.partial").mkdir()
    with folder.Run(arguments(tmp_path, run_name="name"), "title") as run:
        with pytest.raises(UsageError, match=rf"--run_name: .*cannot be used: {tmp_path}/name/\.lock: Is a directory"):
            run.claim()
        (tmp_path / "name" / folder.LOCK).rmdir()
        run.claim()


def test_a_file_system_without_locks_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder.disk, "fcntl", None)
    with folder.Run(arguments(tmp_path, run_name="name"), "title") as run:
        assert run.claim() == tmp_path / "name"
    assert capsys.readouterr().out == f"{tmp_path}/name cannot be locked: let no second process train in it.\n"


def test_the_configuration_is_whole_and_says_who_started(tmp_path):
    with folder.Run(arguments(tmp_path), "title") as run:
        run.begin(arguments(tmp_path, device="cpu"))
        content = json.loads((run.folder / "config.json").read_text())
        assert content["started_by"] == ranks.started_by()
        assert content["environment"]["torch"] == torch.__version__
        assert (run.folder / folder.LOCK).exists()
    assert not (run.folder / folder.LOCK).exists()
