"""A run does not depend on its output, and tells each thing on a line of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import processes
from seal_fast.train import teacher
from terminal import COLUMNS, Terminal

# Few digits, and the streams that the test chose.
PROGRAM = [sys.executable, processes.__file__, "teacher", "300"]
OPTIONS = "--dataset DIGITS --device cpu --train_batch_size 32"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(tmp_path, more: str = "--num_epoch 3") -> list[str]:
    return [*PROGRAM, *f"{OPTIONS} --log_path {tmp_path} --run_name run {more}".split()]


def epochs(tmp_path) -> int:
    return torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"]


@pytest.mark.parametrize("redirection", ["| head -1", "> /dev/full 2>&1", ">&- 2>&- <&-"])
def test_a_run_ends_well_whatever_becomes_of_its_output(redirection, tmp_path):
    script = f'set -o pipefail; "$@" {redirection}'
    words = ["bash", "-c", script, "bash", *command(tmp_path)]
    result = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result
    assert epochs(tmp_path) == 3
    assert (tmp_path / "run" / "curves.png").exists()
    for path in (tmp_path / "run").glob("*.csv"):  # messages have not come into a file that got descriptor 1 or 2
        assert path.read_text().startswith("epoch,")
    assert not result.stderr


def test_a_mistake_ends_with_2_though_nobody_can_read_it(tmp_path):
    words = ["bash", "-c", '"$@" > /dev/full 2>&1', "bash", *command(tmp_path, "--num_epoch 0")]
    assert subprocess.run(words, env=ENVIRONMENT, timeout=120).returncode == 2


def test_what_the_encoding_lacks_is_written_with_backslashes(tmp_path):
    words = [*command(tmp_path, "--num_epoch 1"), "--run_name", "Läufe-日"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "Läufe-日" / "last.pt").exists()
    assert "everything is in" in result.stdout
    assert "L\\xe4ufe-\\u65e5" in result.stdout


def test_ctrl_c_at_a_terminal_is_told_on_lines_of_their_own_and_is_no_error(tmp_path):
    terminal = Terminal(command(tmp_path, "--num_epoch 50"), env=ENVIRONMENT)
    terminal.wait_for("epoch 2/50 ")
    terminal.press(b"\x03")
    assert terminal.code() == 130
    lines = [line for line in terminal.screen() if line]
    assert lines[-2] == "Saving after this step; Ctrl-C again ends at once."
    told = f"stopped by Ctrl-C; all is saved, and seal-fast-teacher --resume {tmp_path}/run goes on."
    assert lines[-1] == f"seal-fast-teacher: {told}"
    assert not [line for line in lines if "error" in line]
    bars = [line for line in terminal.output.replace("\r", "\n").split("\n") if line.startswith("epoch 2/50 ")]
    assert bars
    assert all(len(bar) <= COLUMNS for bar in bars)


def test_a_terminal_that_closes_saves_the_run(tmp_path):
    terminal = Terminal(command(tmp_path, "--num_epoch 50 --save_every 0"), env=ENVIRONMENT)
    terminal.wait_for("epoch 2/50 ")
    terminal.close()
    assert terminal.code() == 75
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) > (0, 0)
    assert sorted(path.name for path in (tmp_path / "run").glob(".*")) == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_saves_the_run(number, tmp_path):
    """As a scheduler sends it: the processes that load data get it, too, and still bring the step's batch."""
    options = f"{OPTIONS} --log_path {tmp_path} --run_name run --num_epoch 50 --save_every 0 --num_workers 2"
    trainer = processes.Trainer(options, tmp_path / "output.txt", program="teacher", digits=300)
    trainer.wait_for("run folder")
    for child in trainer.workers(2):
        os.kill(child, number)
    trainer.send(number)
    assert trainer.code() == 75
    told = f"stopped by {number.name}; all is saved, and seal-fast-teacher --resume {tmp_path}/run goes on."
    assert trainer.lines()[-1] == f"seal-fast-teacher: {told}"
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (saved["epoch"], saved["step"]) > (0, 0)


def test_nohup_holds(tmp_path):
    process = start(["nohup", *command(tmp_path, "--num_epoch 500 --num_workers 1")])
    until(process, "epoch 1/500: ")
    os.killpg(process.pid, signal.SIGHUP)
    for epoch in range(2, 5):  # one may have been written before the signal
        until(process, f"epoch {epoch}/500: ")
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert epochs(tmp_path) >= 4


def test_nohup_holds_for_an_evaluation_too(tmp_path):
    """Its processes that load data belong to no training."""
    assert teacher.main(f"{OPTIONS} --num_epoch 1 --log_path {tmp_path} --run_name run --num_workers 0".split()) == 0
    words = [sys.executable, "-m", "seal_fast.train.evaluate", str(tmp_path / "run"), "--num_workers", "2"]
    process = start(["nohup", *words, "--val_batch_size", "2"])
    until(process, "run/best.pt: ")
    while process.poll() is None and len(processes.children(process.pid)) < 2:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_the_demo_says_what_can_go_on(tmp_path):
    words = [sys.executable, "-m", "seal_fast.train.demo", "--log_path", str(tmp_path), "--num_epoch", "50"]
    process = start(words)
    until(process, "epoch 1/50: ")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    (run,) = tmp_path.iterdir()
    goes_on = f"seal-fast-teacher --resume {run} goes on. The demo itself starts anew."
    assert error.splitlines()[-1] == f"seal-fast-demo: stopped by Ctrl-C; all is saved, and {goes_on}"


def start(words: list[str]) -> subprocess.Popen:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=ENVIRONMENT, start_new_session=True, text=True, **pipes)


def until(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no {text!r}: {process.stderr.read()}")
