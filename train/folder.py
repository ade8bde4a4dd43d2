"""A run's folder: what is in it, and which one a resumed run goes on in. The first rank alone touches it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from seal_fast import __version__
from seal_fast.train import checkpoint, disk, ranks
from seal_fast.train.errors import UsageError
from seal_fast.train.options import FREE_ON_RESUME

LAST, PREVIOUS = "last.pt", "previous.pt"


class Run:
    """A run's folder: config.json, metrics.csv, TensorBoard events, best.pt, last.pt, previous.pt and plots.

    Args:
        args: Resolved options.
        title: What is trained, in a few words; the folder's name unless --run_name gives one.
    """

    def __init__(self, args: argparse.Namespace, title: str):
        root = Path(args.log_path)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        named = root / args.run_name if args.run_name else None
        self.resumed = _resume_from(args, named, title)
        self._automatic = args.resume == "auto" or ranks.restarted()
        if self.resumed is not None:
            self.folder = self.resumed.parent
        else:
            self.folder = named or root / f"{title}-{stamp}-{ranks.started_by()}"
            if self._automatic:
                print("There is no run to resume; a new one begins.", flush=True)
            if _checkpoints(self.folder):
                raise UsageError(f"--run_name: {self.folder} already holds a run; go on with --resume {self.folder}.")

    def load(self, check: Callable[[dict, Path], None]) -> dict:
        """The checkpoint to go on from: with "auto", the one before it where the last is of no use.

        Args:
            check: Raises UsageError where a checkpoint is not one of this run.

        Raises:
            UsageError: It is of no use, nor is the one before it.
        """
        try:
            return _checked(self.resumed, check)
        except UsageError as error:
            previous = self.folder / PREVIOUS
            if not self._automatic or self.resumed == previous or not previous.is_file():
                raise
            try:
                content = _checked(previous, check)
            except UsageError:
                raise error from None
            # Not to become the one before the next.
            os.replace(self.resumed, self.resumed.with_name(f"{LAST}.refused"))
            print(f"{error} Going on from {previous}.", flush=True)
            return content

    def save(self, content: dict) -> None:
        """Write last.pt; the one before it becomes previous.pt."""
        checkpoint.save_keeping_previous(content, self.folder / LAST, self.folder / PREVIOUS)

    def begin(self, args: argparse.Namespace) -> None:
        """Make the folder, and write config.json: the resolved options, versions, commit and machine.

        Raises:
            UsageError: The folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--log_path: cannot make the run's folder {self.folder}: {error.strerror}.") from error
        config = {"options": vars(args), "environment": environment(args.device)}
        disk.write((json.dumps(config, indent=2) + "\n").encode(), self.folder / "config.json")


def _checked(path: Path, check: Callable[[dict, Path], None]) -> dict:
    content = checkpoint.load(path)
    check(content, path)
    return content


def _checkpoints(folder: Path) -> list[Path]:
    return [folder / name for name in (LAST, PREVIOUS) if (folder / name).is_file()]


def _resume_from(args: argparse.Namespace, named: Path | None, title: str) -> Path | None:
    """The checkpoint that --resume names; with "auto" that of the named run, or of the newest with the same options.

    A process that torchrun started again after a failure goes on with the run that it was in.
    """
    automatic = args.resume == "auto" or (args.resume is None and ranks.restarted())
    if args.resume is None and not automatic:
        return None
    if automatic:
        which = f"{title}-*-{ranks.started_by()}" if args.resume is None else f"{title}-*"
        folders = [named] if named else Path(args.log_path).glob(which)
        found = [checkpoints[0] for checkpoints in map(_checkpoints, folders) if checkpoints]
        if not named:
            found = [path for path in found if _same(_options_of(path.parent), args)]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    path = Path(args.resume)
    if ranks.restarted() and path.is_file():
        path = path.parent  # where it has gone on since
    if path.is_dir():
        path = (_checkpoints(path) or [path / LAST])[0]
    if not path.is_file():
        raise UsageError(f"--resume: there is no checkpoint at {path}.")
    return path


def _options_of(folder: Path) -> dict:
    """The options of a run's config.json; none of them where it cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _same(saved: dict, args: argparse.Namespace) -> bool:
    """Whether a run is the one that these options describe, from the weights that it began with."""
    return not difference(saved, args) and saved.get("init_from") == args.init_from


def difference(saved: dict, args: argparse.Namespace) -> str:
    """The first option in which a saved run computes something else than `args`, in words; empty if there is none."""
    for name, value in vars(args).items():
        if name not in FREE_ON_RESUME and saved.get(name) != value:
            return f"--{name} was {saved.get(name)} and is {value}"
    return ""


def environment(device: str) -> dict:
    """Versions, commit and machine, for config.json."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "seal_fast": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


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
