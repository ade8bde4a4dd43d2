"""Files are whole or not there, and a lock has one holder, whatever ends it."""

import errno
import multiprocessing
import os
import signal
import time

import pytest

from seal_fast.train import disk

CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


def hold(path, held, until):
    lock = disk.Lock(path)
    assert lock.acquire(wait=False)
    held.set()
    until.wait()


@pytest.fixture
def other(path):
    """A process that holds the lock."""
    held = CONTEXT.Event()
    process = CONTEXT.Process(target=hold, args=(path, held, CONTEXT.Event()))
    process.start()
    assert held.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_lock_that_is_held_names_its_holder_and_is_free_once_that_was_killed(path, other):
    lock = disk.Lock(path)
    assert not lock.acquire(wait=False)
    assert lock.holder().startswith(f"process {other.pid} on ")
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert path.exists()
    assert lock.acquire(wait=False)
    assert lock.certain
    assert lock.holder().startswith(f"process {os.getpid()} on ")
    lock.release()
    assert not path.exists()


def test_a_process_that_was_forked_does_not_hold_the_lock_of_its_parent(path):
    lock, started, until = disk.Lock(path), CONTEXT.Event(), CONTEXT.Event()
    assert lock.acquire(wait=False)
    child = CONTEXT.Process(target=lambda: (started.set(), until.wait()))
    child.start()
    assert started.wait(30)
    lock._close()  # as the system does when the parent is killed
    try:
        assert disk.Lock(path).acquire(wait=False)
    finally:
        until.set()
        child.join()


def enter(path, seconds: float):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lock = disk.Lock(path)
        assert lock.acquire(wait=True)
        # Fails where another process is between these lines.
        os.close(os.open(path.with_name("inside"), os.O_CREAT | os.O_EXCL))
        os.unlink(path.with_name("inside"))
        lock.release()


def test_one_process_after_the_other_though_each_removes_the_file(path):
    processes = [CONTEXT.Process(target=enter, args=(path, 1.0)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert not path.exists()


def test_a_lock_that_another_user_has_left_is_taken(path, monkeypatch):
    path.touch()
    real = os.open

    def refuse(name, flags, *mode):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return real(name, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)  # root may open all files
    lock = disk.Lock(path)
    assert lock.acquire(wait=False)
    assert lock.certain
    assert not disk.Lock(path).acquire(wait=False)
    lock.release()


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOSPC, False)])
def test_a_file_system_that_cannot_sync_folders_is_left_in_peace(number, passes, tmp_path, monkeypatch):
    def fail(_handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if passes:
        disk.sync_folder(tmp_path)
        return
    with pytest.raises(OSError, match="No space left") as caught:
        disk.sync_folder(tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_a_file_system_without_locks_lets_all_in_and_says_so(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    first, second = disk.Lock(path), disk.Lock(path)
    assert first.acquire(wait=False)
    assert second.acquire(wait=True)
    assert not first.certain
    assert not second.certain
    for lock in (first, second):
        lock.release()
    assert path.exists()  # another machine may have locks there


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    disk.write(b"content", tmp_path / "file")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert (tmp_path / "file").read_bytes() == b"content"


def test_each_file_of_a_tree_is_synced_before_its_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").touch()
    (tmp_path / "two").touch()
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    disk.sync_tree(tmp_path)
    assert sorted(synced) == sorted(str(path) for path in (tmp_path, *tmp_path.rglob("*")))
    for file in (tmp_path / "a" / "one", tmp_path / "two"):
        assert synced.index(str(file)) < synced.index(str(file.parent))


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    (tmp_path / "file.partial").mkdir()
    with pytest.raises(OSError, match=r"Is a directory.*/file'"):
        disk.write(b"after", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"before"
