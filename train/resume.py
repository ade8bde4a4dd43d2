"""Which run a start goes on with, from which checkpoint, and with which options."""

from __future__ import annotations

import argparse
import glob
import json
import os
from collections.abc import Iterable
from pathlib import Path

from seal_fast.train import checkpoint, ranks
from seal_fast.train.errors import UsageError

LAST, PREVIOUS, CONFIG = "last.pt", "previous.pt", "config.json"

# Options that may differ when a run is resumed: they say where and how fast it runs, not what it computes. A teacher's
# file may have been moved, and --init_from is not read again.
FREE_ON_RESUME = frozenset(
    [
        "data_path",
        "log_path",
        "run_name",
        "resume",
        "num_workers",
        "val_batch_size",
        "device",
        "asked",
        "tea_path",
        "init_from",
        "step_mode",
        "backend",
        "packed_spikes",
        "cuda_graph",
        "save_every",
    ]
)


def checkpoints(folder: Path) -> list[Path]:
    """Those of a run's folder, the last one first."""
    return [folder / name for name in (LAST, PREVIOUS) if os.path.isfile(folder / name)]


def find(args: argparse.Namespace, title: str) -> tuple[Path | None, Path | None]:
    """The folder that the options mean, and the checkpoint in it to go on from; None for what there is not.

    With --resume auto it is the named run, or the newest one with the same options. A process that torchrun started
    again after a failure goes on with the run that it was in. Of both, what ended before its first checkpoint begins
    again in its folder.
    """
    named = Path(args.log_path, args.run_name) if args.run_name else None
    if args.resume not in (None, "auto"):
        return place_to_resume(args.resume)
    if args.resume is None and not ranks.restarted():
        return named, None
    folders = [named] if named else list(Path(args.log_path).glob(f"{glob.escape(title)}-*"))
    if args.resume is None:
        folders = [folder for folder in folders if _config(folder).get("started_by") == ranks.started_by()]
    elif not named:
        folders = [folder for folder in folders if _same(_config(folder).get("options", {}), args)]
    path = _newest(found[0] for found in map(checkpoints, folders) if found)
    if path is not None:
        return path.parent, path
    begun = _newest(folder / CONFIG for folder in folders if os.path.isfile(folder / CONFIG))
    return named or (begun and begun.parent), None


def _newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def place_to_resume(named: str) -> tuple[Path, Path | None]:
    """The folder of the run that --resume names, and the checkpoint: itself, or the folder's last one.

    There is no checkpoint in the folder of a run that ended before its first one: it begins again.

    Raises:
        UsageError: There is neither a checkpoint nor such a folder.
    """
    path = Path(named)
    if ranks.restarted() and os.path.isfile(path):
        path = path.parent  # where it has gone on since
    if os.path.isdir(path):
        found = checkpoints(path)
        if not found and _config(path):
            return path, None
        path = (found or [path / LAST])[0]
    if not os.path.isfile(path):
        raise UsageError(f"--resume: there is no checkpoint at {path}.")
    return path.parent, path


def options_to_resume(named: str) -> dict:
    """The options of the run that --resume names: those of its config.json, or else those in the checkpoint.

    Raises:
        UsageError: There is no checkpoint, or neither file has them.
    """
    folder, path = place_to_resume(named)
    options = _config(folder).get("options")
    if not options and path is not None:
        options = checkpoint.load(path).get("options")
    if not isinstance(options, dict):
        raise UsageError(f"--resume: {path or folder} does not say with which options its run began.")
    return options


def _config(folder: Path) -> dict:
    """What a run's config.json says; nothing where it cannot be read."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("options", {}), dict) else {}


def _same(saved: dict, args: argparse.Namespace) -> bool:
    """Whether a run is the one that these options describe, from the weights that it began with to its last epoch."""
    ends = all(saved.get(name) == getattr(args, name) for name in ("init_from", "num_epoch"))
    return ends and not difference(saved, args)


def difference(saved: dict, args: argparse.Namespace) -> str:
    """The first option in which a saved run computes something else than `args`, in words; empty if there is none.

    More epochs than it was to have are no difference, where the command asks for them.
    """
    for name, value in vars(args).items():
        before = saved.get(name)
        grows = name == "num_epoch" and args.asked.get(name) and value > (before or 0)
        if name in FREE_ON_RESUME or value == before or grows:
            continue
        return f"--{name} was {before} and is {value}{'; it may only grow' if name == 'num_epoch' else ''}"
    return ""
