"""A run's folder: what is in it, and who may use it. The first rank alone touches it."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import errno
import itertools
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from seal_fast import __version__
from seal_fast.train import checkpoint, disk, ranks
from seal_fast.train.errors import UsageError
from seal_fast.train.resume import CONFIG, LAST, PREVIOUS, checkpoints, find

LOCK = ".lock"


class Run:
    """A run's folder: config.json, metrics.csv, TensorBoard events, best.pt, last.pt, previous.pt and plots.

    From `claim` to the end of its context, no other start of a trainer can use it.

    Args:
        args: Resolved options.
        title: What is trained, in a few words; the folder's name, with the time, unless --run_name gives one.

    Attributes:
        folder: The folder; None for a new one without a name, until it is claimed.
        resumed: The checkpoint to go on from; None for a new run.
    """

    def __init__(self, args: argparse.Namespace, title: str):
        self._title, self._log_path = title, Path(args.log_path)
        self._flag = _flag_of_folder(args)
        self._automatic = args.resume == "auto" or ranks.restarted()
        self._lock: disk.Lock | None = None
        self.folder, self.resumed = find(args, title)
        if args.resume not in (None, "auto") and self.resumed is None:
            print(f"{self.folder} has no checkpoint yet; its run begins anew.", flush=True)
        elif self._automatic and self.resumed is None:
            print("There is no run to resume; a new one begins.", flush=True)
        # Before data are read for nothing; `claim` looks again.
        if self.folder is not None and self.folder.is_dir():
            with contextlib.suppress(OSError):
                self._locked().release()
            self._require_new()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception) -> None:
        if self._lock is not None:
            self._lock.release()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lock": None}  # the other ranks get a copy without it

    def claim(self) -> Path:
        """Make the folder if it is new, lock it, and remove what a process that was killed has left half written.

        Returns:
            The folder.

        Raises:
            UsageError: Another process uses it, or it cannot be made.
        """
        if self._lock is not None:
            return self.folder
        try:
            if self.folder is None:
                self.folder = _make(self._log_path, self._title)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock = self._locked()
            self._require_new()  # nobody has begun a run there meanwhile
            for path in self.folder.glob("*.partial"):
                if path.is_file():
                    path.unlink(missing_ok=True)
        except OSError as error:
            where = f"the run's folder {self.folder or self._log_path} cannot be used"
            raise UsageError(f"{self._flag}: {where}: {error.filename}: {error.strerror}.") from error
        if not lock.certain:
            print(f"{self.folder} cannot be locked: let no second process train in it.", flush=True)
        return self.folder

    def _locked(self) -> disk.Lock:
        lock = disk.Lock(self.folder / LOCK)
        if not lock.acquire(wait=False):
            used = f"{self.folder} is used by {lock.holder()}; a run belongs to one process at a time"
            raise UsageError(f"{self._flag}: {used}.")
        return lock

    def _require_new(self) -> None:
        if self.resumed is None and checkpoints(self.folder):
            raise UsageError(f"{self._flag}: {self.folder} already holds a run; go on with --resume {self.folder}.")

    def load(self, check: Callable[[dict, Path], None]) -> dict:
        """The checkpoint to go on from: with "auto", the one before it where the last is of no use.

        Args:
            check: Raises UsageError where a checkpoint is not one of this run.

        Raises:
            UsageError: It is of no use, nor is the one before it.
        """
        last, previous = self.folder / LAST, self.folder / PREVIOUS
        try:
            path, content = self.resumed, _checked(self.resumed, check)
        except UsageError as error:
            if self.resumed == previous or not previous.is_file():
                raise
            if not self._automatic:
                raise _with_remedy(error, self.resumed, previous) from error
            try:
                path, content = previous, _checked(previous, check)
            except UsageError:
                raise error from None
            print(f"{error} Going on from {previous}.", flush=True)
        if path == previous and last.exists():
            os.replace(last, last.with_name(f"{LAST}.refused"))  # not to become the one before the next
        return content

    def save(self, content: dict) -> None:
        """Write last.pt; the one before it becomes previous.pt."""
        checkpoint.save_keeping_previous(content, self.folder / LAST, self.folder / PREVIOUS)

    def begin(self, args: argparse.Namespace) -> Path:
        """Claim the folder, and write config.json: the resolved options, versions, commit and machine.

        Returns:
            The folder.

        Raises:
            UsageError: The folder cannot be claimed.
        """
        self.claim()
        content = {"options": vars(args), "environment": environment(args.device), "started_by": ranks.started_by()}
        disk.write((json.dumps(content, indent=2) + "\n").encode(), self.folder / CONFIG)
        return self.folder


def _with_remedy(error: UsageError, path: Path, previous: Path) -> UsageError:
    """The error with what helps where the checkpoint itself is of no use, not the options."""
    try:
        checkpoint.load(path)
    except UsageError:
        return UsageError(f"{error} --resume {previous} goes on from the one before it.")
    return error


def check_place(args: argparse.Namespace) -> None:
    """See whether the folder of a new run can be made, before anything is computed for it.

    Raises:
        UsageError: It cannot.
    """
    folder = Path(args.log_path, args.run_name or "").absolute()
    try:
        existing = next(path for path in (folder, *folder.parents) if _exists(path))
        for name in folder.relative_to(existing).parts:
            _exists(existing / name)  # or is too long to be made there
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is no folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{existing} cannot be written to")
    except OSError as error:
        raise UsageError(f"{_flag_of_folder(args)}: no run can be in {folder}: {error.strerror}.") from error


def _exists(path: Path) -> bool:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _flag_of_folder(args: argparse.Namespace) -> str:
    if args.resume not in (None, "auto"):
        return "--resume"
    return "--run_name" if args.run_name else "--log_path"


def _make(log_path: Path, title: str) -> Path:
    """A folder that nobody else has made: processes that start in one second get names of their own."""
    log_path.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for number in itertools.count(1):
        folder = log_path / (f"{title}-{stamp}" if number == 1 else f"{title}-{stamp}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def _checked(path: Path, check: Callable[[dict, Path], None]) -> dict:
    content = checkpoint.load(path)
    check(content, path)
    return content


def environment(device: str) -> dict:
    """Versions, commit and machine, for config.json."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "seal_fast": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("torchvision", "numpy")},
        "platform": platform.platform(),
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # not every installer leaves a note
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, marked -dirty where it was changed; None outside one."""

    def git(*words: str) -> subprocess.CompletedProcess:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=False)

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode != 0:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").stdout.strip() or None
    except OSError:  # no git here
        return None
