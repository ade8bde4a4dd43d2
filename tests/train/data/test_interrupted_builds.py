"""A build that is killed at any moment: the next one gives the same frames, and leaves nothing else behind."""

import random
import signal
import threading
import time
from functools import partial
from unittest.mock import patch

import pytest
import torch

import makers
from processes import CONTEXT, die_at
from seal_fast.train.data import camera, event_folder, load, publish
from seal_fast.train.disk import Lock

SCRAP = ".building-" + 32 * "0"
CALLS = ("fsync", "rename", "replace", "mkdir", "unlink")


def build(root, dies_at, started):
    """Load in this process, which ends at its system call of that number."""
    torch.set_num_threads(1)
    started.set()
    die_at(dies_at, CALLS)
    read(root)


def read(root):
    """Load one recording of each digit, or two classes."""
    options = {"role": "student", "time_steps": 2, "frame_size": 16}
    if (root / "digits").exists():
        with patch.object(event_folder, "write_digits", partial(camera.write_digits, per_class=1)):
            return load("DIGITS_DVS", root / "digits", **options)
    with patch.dict(event_folder.CLASSES, {"CIFAR10_DVS_SJ": ("cat", "dog")}):
        return load("CIFAR10_DVS_SJ", root, **options)


def contents(root):
    """What lies below, as `find` shows it, and the frames; the name of a cache depends on times of files."""
    paths = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    frames = [path.read_bytes() for path in root.rglob("frames.npy")]
    assert len(frames) == 1
    (name,) = {path.parent.name for path in root.rglob("frames.npy")}
    return [path.replace(name, "CACHE") for path in paths], frames


def make(kind, root):
    """Data of which everything is still to be built."""
    if kind == "digits":
        (root / "digits").mkdir(parents=True)
    else:
        makers.cifar10_dvs(root, per_class=5, events=50, layout="download")
    if kind == "half unpacked":
        makers.cifar10_dvs(root, per_class=2, events=50)
    return root


@pytest.fixture(scope="module", params=["archives", "half unpacked", "digits"])
def whole(request, tmp_path_factory):
    """The kind of data, and what a build without interruption leaves."""
    root = make(request.param, tmp_path_factory.mktemp("whole"))
    read(root)
    expected = contents(root)
    assert not [path for path in expected[0] if ".building" in path or ".lock" in path]
    return request.param, expected


def killed(root, dies_at, after=None):
    started = CONTEXT.Event()
    process = CONTEXT.Process(target=build, args=(root, dies_at, started))
    process.start()
    assert started.wait(60)
    if after is not None:
        time.sleep(after)
        process.kill()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def check(root, expected):
    read(root)
    assert contents(root) == expected


def test_killed_at_each_call(whole, tmp_path):
    kind, expected = whole
    number, before = 0, 0
    while True:
        root = make(kind, tmp_path / str(number))
        if not killed(root, number):
            break
        before += any(root.rglob(".building-*"))
        check(root, expected)
        number += {"digits": 7, "archives": 3}.get(kind, 1)  # a digit takes six calls, each alike
    check(root, expected)
    assert number > 20
    assert before > 2


def test_killed_at_random_moments(whole, tmp_path):
    """Until three builds were hit: some have ended before their kill, as many as the machine is fast."""
    kind, expected = whole
    hits, generator = 0, random.Random(0)
    for number in range(20):
        root = make(kind, tmp_path / str(number))
        for _ in range(2):  # the second one is killed where it goes on
            hits += killed(root, 10**9, after=0.1 * generator.random() ** 2)
        check(root, expected)
        if hits >= 3:
            return
    raise AssertionError(f"{hits} of 40 builds were hit")


def test_a_build_that_goes_on_keeps_its_scratch_folder(tmp_path):
    with publish.one_at_a_time(tmp_path), publish.scratch_folder(tmp_path) as scratch:
        publish.clean(tmp_path)
        assert scratch.is_dir()
    assert [path.name for path in tmp_path.rglob("*")] == [publish.CACHE]


def test_what_was_left_makes_room_before_anything_is_built(tmp_path):
    for folder in (tmp_path, tmp_path / publish.CACHE):
        (folder / SCRAP / "a").mkdir(parents=True)
    with publish.one_at_a_time(tmp_path):
        assert not list(tmp_path.rglob(".building-*"))
        assert list(tmp_path.rglob(".lock"))
    assert not list(tmp_path.rglob(".lock"))


def test_nothing_is_removed_without_a_lock(tmp_path, monkeypatch):
    """Where the file system has none, another process may be building."""
    monkeypatch.setattr("seal_fast.train.disk.fcntl", None)
    scrap = tmp_path / SCRAP
    scrap.mkdir()
    with publish.one_at_a_time(tmp_path):
        pass
    publish.clean(tmp_path)
    assert scrap.is_dir()


def test_scraps_where_nothing_is_left_to_build(tmp_path):
    root = makers.cifar10_dvs(tmp_path, per_class=5)
    read(root)
    for folder in (root, root / publish.CACHE):
        (folder / SCRAP).mkdir()
        (folder / SCRAP / "a").touch()
    (root / publish.CACHE / ".lock").touch()
    read(root)
    assert not list(root.rglob(".building-*")) + list(root.rglob(".lock"))


def test_digits_are_filmed_under_the_lock(tmp_path):
    """In a plain call too: its scratch folders must not be removed by another process."""
    camera.read_digits()  # what is imported for it
    lock = Lock(tmp_path / publish.CACHE / ".lock")
    lock.path.parent.mkdir()
    assert lock.acquire(wait=False)
    thread = threading.Thread(target=camera.write_digits, args=(tmp_path, 1))
    thread.start()
    time.sleep(0.5)
    assert not list(tmp_path.rglob(".building-*")) + list(tmp_path.glob("extract"))
    lock.release()
    thread.join()
    assert len(list(tmp_path.glob("extract/*/*.aedat"))) == 10
