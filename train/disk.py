"""Files that other processes see whole or not at all, on the disk before they are seen, and locks between processes."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What file systems without locks answer, NFS without its lock daemon among them.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_SYNCS = 8  # files that are brought to the disk at once


def write(content: bytes | memoryview, path: Path, before_rename: Callable[[], None] = lambda: None) -> None:
    """Write a file whole or not at all: it is on the disk under another name before it takes its own.

    Raises:
        OSError: The disk is full, or the folder cannot be written to; what was at `path` is still there.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        before_rename()
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a rename is lost with the power until then."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    try:
        _sync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what file systems answer that cannot do it
            raise OSError(error.errno, error.strerror, str(folder)) from None


def sync_tree(folder: Path) -> None:
    """Bring all that is in a folder to the disk.

    Raises:
        OSError: It cannot be written.
    """
    # Thousands of files one after the other would wait for the disk each time.
    with ThreadPoolExecutor(_SYNCS) as pool:
        for parent, _, names in os.walk(folder):
            list(pool.map(_sync, (Path(parent, name) for name in names)))
            sync_folder(Path(parent))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Lock:
    """A file that one process at a time holds; the system lets go of it when that process ends, however it ends.

    The file is there while it is held, and after a holder that was killed. A forked process does not hold it.

    Args:
        path: The file; its folder exists.

    Attributes:
        certain: Whether no other process holds it: false where the system or the file system has no locks.
    """

    def __init__(self, path: Path):
        self.path = path
        self.certain = False
        self._handle: int | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._close)

    def acquire(self, *, wait: bool) -> bool:
        """Hold the file.

        Args:
            wait: Whether to wait for another process that holds it.

        Returns:
            Whether it is held now; true as well where there are no locks.

        Raises:
            OSError: The file cannot be made.
        """
        if fcntl is None:
            return True
        while True:
            self._handle = self._open()
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                self._close()
                return False
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    self._close()
                    raise
                return True
            if self._is_at_its_path():
                break
            self._close()  # its last holder has removed it meanwhile
        self.certain = True
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk; who holds it is for others to read alone
            os.truncate(self._handle, 0)
            os.write(self._handle, f"process {os.getpid()} on {platform.node()} since {now}".encode())
        return True

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's, who was killed: on local disks it can be locked without writing to it
            return os.open(self.path, os.O_RDONLY)

    def holder(self) -> str:
        """Who holds it, in words."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace") or "another process"
        except OSError:
            return "another process"

    def release(self) -> None:
        """Let go of the file, and remove it."""
        if self.certain:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._close()
        self.certain = False

    def _is_at_its_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)
