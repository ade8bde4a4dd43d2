"""A cache of frames is what its recordings give, or is refused; checksums prove it."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import makers
from seal_fast.train.data import DataError, cache, load
from seal_fast.train.data.recordings import find


@pytest.fixture
def root(tmp_path):
    return makers.cifar10_dvs(tmp_path)


@pytest.fixture
def recordings(root):
    return find(root, makers.DVS_CLASSES)[0]


def refused(recordings):
    with pytest.raises(DataError) as caught:
        cache.frame_cache(recordings, 3)
    return caught.value.sentence


@pytest.mark.parametrize("number", [0, 7, 19])
@pytest.mark.parametrize("how", ["zeros", "one bit"])
def test_frames_without_their_checksum_are_named(how, number, recordings):
    """As a loss of power leaves a file that was not synced: of the right length, and zeros."""
    folder = cache.frame_cache(recordings, 3)
    frames = np.load(folder / "frames.npy", mmap_mode="r+")
    if how == "zeros":
        frames[number] = 0
    else:
        frames.view(np.int32)[number, -1, -1, -1, -1] ^= 1
    frames.flush()
    name = recordings.files[number].relative_to(recordings.root)
    mend = f"delete {folder}, and it will be made again."
    assert refused(recordings) == f"The frames of {name} in {folder} do not have their checksum; {mend}"
    shutil.rmtree(folder)
    assert cache.frame_cache(recordings, 3) == folder


@pytest.mark.parametrize("name", ["frames.npy", "labels.npy", "key.json"])
def test_a_file_of_zeros_is_refused(name, recordings):
    folder = cache.frame_cache(recordings, 3)
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    text = f"{folder} is incomplete or was changed; delete {folder}, and it will be made again."
    assert refused(recordings) == text


@pytest.mark.parametrize("content", ["[]", "{}", "3", "", "{", '{"crc32": 3}'])
def test_another_key(content, recordings):
    folder = cache.frame_cache(recordings, 3)
    (folder / "key.json").write_text(content)
    assert f"{folder} is incomplete or was changed" in refused(recordings)


@pytest.mark.parametrize("name", ["frames.npy", "labels.npy"])
def test_a_byte_of_a_header_that_was_changed(name, recordings):
    """numpy's own reader raises tokenize.TokenError and others on these."""
    path = cache.frame_cache(recordings, 3) / name
    content = path.read_bytes()
    for place, byte in itertools.product(range(0, 128, 5), b"'(\x009"):
        if content[place] == byte:
            continue
        path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
        with pytest.raises(DataError, match="is incomplete or was changed; delete"):
            cache.frame_cache(recordings, 3)


def test_a_key_of_brackets(recordings):
    (cache.frame_cache(recordings, 3) / "key.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="is incomplete or was changed; delete"):
        cache.frame_cache(recordings, 3)


def test_fewer_checksums(recordings):
    folder = cache.frame_cache(recordings, 3)
    key = json.loads((folder / "key.json").read_text())
    key["crc32"].pop()
    (folder / "key.json").write_text(json.dumps(key))
    assert f"{folder} is incomplete or was changed" in refused(recordings)


def test_other_labels(recordings):
    folder = cache.frame_cache(recordings, 3)
    np.save(folder / "labels.npy", np.zeros(20, np.int64))
    assert f"{folder} is incomplete or was changed" in refused(recordings)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs the paths of open files")
def test_frames_are_published_after_they_are_on_the_disk(recordings, monkeypatch):
    """Each file of the cache, and its folder, is synced before the folder takes its name; that name is synced after."""
    calls = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (calls.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "rename", lambda old, new: (calls.append((str(old), str(new))), rename(old, new)))
    folder = cache.frame_cache(recordings, 3)
    (place,) = [number for number, call in enumerate(calls) if isinstance(call, tuple)]
    scratch, published = calls[place]
    assert published == str(folder)
    synced = {scratch, *(f"{scratch}/{name}" for name in ("frames.npy", "labels.npy", "key.json"))}
    assert synced <= set(calls[:place])
    assert str(folder.parent) in calls[place + 1 :]


def test_a_cut_while_a_run_reads(root):
    """A memory map would end the process with SIGBUS."""
    load("CIFAR10_DVS_SJ", root, role="student", time_steps=3)
    (path,) = root.rglob("frames.npy")
    os.truncate(path, path.stat().st_size - 4)
    last = cache.CachedFrames(path.parent, (20, 3, 2, 48, 48), [0] * 20, range(20), None)
    assert last[18][0].shape == (3, 2, 48, 48)
    with pytest.raises(DataError, match=r"frames\.npy was cut during this run; delete "):
        last[19]


def test_a_cache_that_vanishes_after_its_check(tmp_path):
    with pytest.raises(DataError, match=r"frames\.npy cannot be read: no such file or directory\.$"):
        cache.CachedFrames(tmp_path, (1, 1, 2, 4, 4), [0], [0], None)[0]


class Failing:
    """A file of a failing disk."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def seek(self, *place):
        return self.file.seek(*place)

    def readinto(self, _):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_while_a_run_reads(root, monkeypatch):
    splits = load("CIFAR10_DVS_SJ", root, role="student", time_steps=3)
    path_open = cache.Path.open
    monkeypatch.setattr(cache.Path, "open", lambda self, *mode, **how: Failing(path_open(self, *mode, **how)))
    with pytest.raises(DataError, match=r"frames\.npy cannot be read: input/output error\.$"):
        splits.val[0]


@pytest.mark.parametrize("change", ["touched", "other label", "other format"])
def test_what_the_name_depends_on(change, recordings, monkeypatch):
    before = cache.frame_cache(recordings, 3)
    if change == "touched":
        path = recordings.files[4]
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    elif change == "other label":
        recordings = cache.Recordings(recordings.root, recordings.files, (*recordings.labels[:-1], 0))
    else:
        monkeypatch.setattr(cache, "_FORMAT", cache._FORMAT + 1)
    assert cache.frame_cache(recordings, 3) != before
