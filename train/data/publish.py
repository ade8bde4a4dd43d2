"""Building under a dataset's folder: other processes see what was built whole or not at all, as they do after a crash.

What is built lies in a scratch folder, is brought to the disk, and takes its name then. One process at a time builds,
and what an interrupted one left is removed by the next.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from seal_fast.train.disk import Lock, sync_folder, sync_tree

from .errors import DataError

CACHE = "seal_fast_frames"  # folder under a dataset's root: caches of frames, and the lock
_SCRATCH = ".building-"
_SCRATCH_NAME = re.compile(re.escape(_SCRATCH) + "[0-9a-f]{32}")
_LOCK = ".lock"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what fails while something is written below a folder into a sentence."""
    try:
        yield
    except OSError as error:
        advice = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "; make room there, or copy the data to a folder where there is some"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "; allow writing there, or copy the data to a folder where you may write"
        place = error.filename or folder
        raise DataError(f"{place} cannot be written to ({error.strerror or error}){advice}.") from None


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder inside `parent`, removed with what is left in it at the end; to be used within `one_at_a_time`.

    Raises:
        DataError: the folder, or what is put into it, cannot be written.
    """
    folder = parent / f"{_SCRATCH}{uuid.uuid4().hex}"
    try:
        with _writing(parent):
            make_folder(parent)
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing; their names are on the disk then.

    Raises:
        OSError: it cannot be made.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def publish(folder: Path, destination: Path) -> None:
    """Move a finished folder to its place, or leave it if another process was first.

    Raises:
        OSError: it cannot be moved.
    """
    sync_tree(folder)
    make_folder(destination.parent)
    try:
        os.rename(folder, destination)
    except OSError:
        if not destination.is_dir():
            raise
    sync_folder(destination.parent)


def publish_files(folder: Path, destination: Path) -> None:
    """Move the finished files of a folder into another one, in place of those that have their names there.

    Raises:
        OSError: they cannot be moved.
    """
    sync_tree(folder)
    make_folder(destination)
    for name in sorted(os.listdir(folder)):
        os.replace(folder / name, destination / name)
    sync_folder(destination)


def near(destination: Path, root: Path) -> Path:
    """Where to build what becomes a part of `destination`: in it, above it, or in the root, whichever is there.

    A link may have put each of them on another disk, and nothing can be renamed from one disk to another.
    """
    return next((folder for folder in (destination, destination.parent) if folder.is_dir()), root)


@contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Let one process after the other build under a dataset's folder, so that they do not all do the same work.

    Where the system or the file system has no locks, all of them work, and the first one's `publish` counts. Where it
    has, what an interrupted build left is removed first.

    Raises:
        DataError: the folder cannot be written to.
    """
    lock = Lock(root / CACHE / _LOCK)
    with _writing(root):
        make_folder(lock.path.parent)
        left = os.path.lexists(lock.path)
        lock.acquire(wait=True)
    try:
        if lock.certain:
            _sweep(root, deep=left)
        yield
    finally:
        lock.release()


def clean(root: Path) -> None:
    """Remove what an interrupted build left under a dataset's folder, unless something is built there now."""
    left = os.path.lexists(root / CACHE / _LOCK)
    if not left and not _scraps(root, deep=False):
        return
    lock = Lock(root / CACHE / _LOCK)
    with suppress(OSError):  # where nothing can be removed, nothing depends on it
        if lock.acquire(wait=False):
            if lock.certain:
                _sweep(root, deep=left)
            lock.release()


def _sweep(root: Path, *, deep: bool) -> None:
    for folder in _scraps(root, deep=deep):
        shutil.rmtree(folder, ignore_errors=True)


def _scraps(root: Path, *, deep: bool) -> list[Path]:
    """Scratch folders that are left in the root and the cache, or also in class folders and those that hold them.

    Their names are no others': what looks alike is its owner's.
    """
    parents = [root, *(root.glob("*/") if deep else [root / CACHE]), *(root.glob("*/*/") if deep else [])]
    found = []
    for parent in parents:
        with suppress(OSError):
            found += [parent / name for name in os.listdir(parent) if _SCRATCH_NAME.fullmatch(name)]
    return [folder for folder in found if folder.is_dir() and not folder.is_symlink()]
