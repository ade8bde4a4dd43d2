"""Making folders so that other processes see them whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DataError


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder inside `parent`, removed with what is left in it at the end.

    Raises:
        DataError: the folder, or what is put into it, cannot be written.
    """
    folder = parent / f".building-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise DataError(
            f"{parent} cannot be written to ({error.strerror or error}); make room in it and allow writing, or copy "
            "the data to a folder where you may write."
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, destination: Path) -> None:
    """Move a finished folder to its place, or leave it if another process was first."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(folder, destination)
    except OSError:
        if not destination.is_dir():
            raise


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process after the other in, so that they do not all do the same work.

    Only time depends on it: where the system or the file system has no locks, all of them work, and the first one's
    `publish` counts.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written to ({error.strerror}); copy the data where you may write."
        ) from None
    with handle:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
