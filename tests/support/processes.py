"""Trainers in processes of their own, which start in a moment and can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

DATA_MODULES = [f"seal_fast.train.data.{module}" for module in ("cifar", "event_folder", "image_folder", "mnist")]
CONTEXT = multiprocessing.get_context("forkserver")
# Imported once: a trainer would spend most of a short run on it. There is one list for all tests of a process, as the
# last one that is set holds for all contexts.
CONTEXT.set_forkserver_preload(
    [
        "seal_fast.train.distill",
        *DATA_MODULES,
        "torch.utils.tensorboard",
        "sklearn.datasets",
        "sklearn.model_selection",
        "matplotlib.pyplot",
    ]
)
_SAVING = ("fsync", "link", "replace")  # the system calls that a save consists of, besides writing


class Trainer:
    """`seal-fast-distill` or `seal-fast-teacher` with these options.

    Args:
        options: The command line.
        output: File that gets what it prints.
        program: "distill" or "teacher".
        digits: How many of scikit-learn's digits there are; all by default.
        dies_at: Which of the system calls of its saves it does not live to make, by its own SIGKILL; None for no such
            end.
        environment: Variables that it sees, as torchrun sets them.
    """

    def __init__(self, options: str, output: Path, *, program="distill", digits=None, dies_at=None, environment=None):
        self.output = output
        output.write_text("")
        self.process = CONTEXT.Process(
            target=_main, args=(program, options, output, digits, dies_at, environment or {})
        )
        self.process.start()

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until it has printed `text`."""
        end = time.monotonic() + seconds
        while text not in self.output.read_text():
            assert self.process.is_alive(), self.output.read_text()
            assert time.monotonic() < end, f"no {text!r} in: {self.output.read_text()}"
            time.sleep(0.01)

    def workers(self, number: int) -> list[int]:
        """Wait until it has so many child processes, which load data."""
        end = time.monotonic() + 60
        while len(found := children(self.process.pid)) < number:
            assert self.process.is_alive(), self.output.read_text()
            assert time.monotonic() < end, f"it has {len(found)} processes"
            time.sleep(0.01)
        return found

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def code(self, seconds: float = 120) -> int:
        """Wait for its end and return its exit code; -9 after SIGKILL."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it did not end within {seconds} s: {self.output.read_text()}")
        return self.process.exitcode

    def lines(self) -> list[str]:
        """What it has printed."""
        return self.output.read_text().splitlines()


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank(number: int, of: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank on one machine."""
    own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": of, "LOCAL_WORLD_SIZE": of, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def in_ranks(function, size: int, *args) -> None:
    """Call `function(*args)` in as many ranks, each a process."""
    port = free_port()
    processes = [
        CONTEXT.Process(target=_in_rank, args=(rank(number, size, port), function, args)) for number in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, f"exit code {process.exitcode}"


def _in_rank(environment: dict[str, str], function, args: tuple) -> None:
    import torch

    from seal_fast.train import ranks

    os.environ.update(environment)
    torch.set_num_threads(1)
    ranks.start(torch.device("cpu"))
    function(*args)
    ranks.finish()


def _main(program: str, options: str, output: Path, digits: int | None, dies_at: int | None, environment: dict) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    # Not the fork server that has made this process: as in a trainer of its own, what loads data are its children.
    multiprocessing.set_start_method("fork", force=True)
    if dies_at is not None:
        die_at(dies_at, _SAVING)
    code = trainer(program, options, digits)
    sys.stdout.flush()
    sys.exit(code)


def trainer(program: str, options: str, digits: int | None) -> int:
    """Run a trainer in this process, on one thread; returns its exit code."""
    import torch

    from seal_fast.train import distill, teacher
    from seal_fast.train.data import digits as data

    torch.set_num_threads(1)
    if digits is not None:
        every = data.read_digits()
        data.read_digits = lambda: tuple(array[:digits] for array in every)
    return {"distill": distill, "teacher": teacher}[program].main(options.split())


def die_at(number: int, calls: tuple[str, ...]) -> None:
    """Let this process end by its own SIGKILL where it makes one more of these system calls than `number`."""
    made = 0

    def deadly(call):
        def wrapped(*args, **kwargs):
            nonlocal made
            made += 1
            if made > number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in calls:
        setattr(os, name, deadly(getattr(os, name)))


if __name__ == "__main__":  # under torchrun
    sys.exit(trainer(sys.argv[1], " ".join(sys.argv[3:]), int(sys.argv[2])))
