import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import makers
from seal_fast.train.data import DataError, cache, event_folder, load, publish
from seal_fast.train.data.aedat import write_aedat
from seal_fast.train.data.frames import recording_to_frames

LAYOUTS = ("extract", "flat", "events_np", "download")


def read(root, time_steps=3, **options):
    return load("CIFAR10_DVS_SJ", root, role="student", time_steps=time_steps, **options)


def sentence(root, **options):
    with pytest.raises(DataError) as caught:
        read(root, **options)
    assert "\n" not in caught.value.sentence
    return caught.value.sentence


def folders(root):
    return sorted(path for path in (root / cache.CACHE).iterdir() if path.is_dir())


def samples(splits):
    """All samples without augmentation, in the order of the files."""
    parts = [(splits.train.indices, splits.train), (splits.val.indices, splits.val)]
    found = {}
    for indices, part in parts:
        part.transform = None
        found.update({index: part[place] for place, index in enumerate(indices)})
    return [found[index] for index in range(len(found))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    """Every layout gives the frames of its files in the order of torchvision's DatasetFolder."""
    makers.cifar10_dvs(tmp_path / "reference", per_class=3)
    root = makers.cifar10_dvs(tmp_path / layout, per_class=3, layout=layout)
    splits = read(root)
    files = sorted((tmp_path / "reference" / "extract").glob("*/*.aedat"))
    assert len(files) == 30
    for path, (frames, label) in zip(files, samples(splits), strict=True):
        assert splits.classes[label] == path.parent.name
        assert np.array_equal(frames.numpy(), recording_to_frames(path, 3))


def test_frames_of_another_size_are_resized_once_from_the_sensor(tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    published, small = read(root), read(root, frame_size=20)
    assert (published.image_size, small.image_size) == (48, 20)
    assert len(folders(root)) == 2  # neither takes the place of the other
    files = sorted(root.glob("extract/*/*.aedat"))
    for path, (frames, _), (whole, _) in zip(files, samples(small), samples(published), strict=True):
        assert frames.shape == (3, 2, 20, 20)
        assert np.array_equal(frames.numpy(), recording_to_frames(path, 3, 20))
        assert whole.shape == (3, 2, 48, 48)
        torch.testing.assert_close(frames.mean(), whole.mean(), rtol=0.02, atol=0)  # measured 0.009


@pytest.mark.parametrize("size", [0, 129, 2.5])
def test_impossible_frame_size(size, tmp_path):
    with pytest.raises(ValueError, match="frame_size must be a whole number from 1 to 128"):
        read(makers.cifar10_dvs(tmp_path), frame_size=size)


def test_published_split(tmp_path):
    splits = read(makers.cifar10_dvs(tmp_path, per_class=5))
    expected = torch.utils.data.random_split(range(50), [45, 5], generator=torch.Generator().manual_seed(42))
    assert splits.train.indices == expected[0].indices
    assert splits.val.indices == expected[1].indices
    assert splits.val.transform is None
    assert splits.train.transform is not None


def test_whole_set_is_split_9000_to_1000(tmp_path, monkeypatch):
    root = makers.cifar10_dvs(tmp_path, per_class=1)
    cached = cache.frame_cache(cache.Recordings(root, tuple(root.glob("extract/cat/*")), (0,)), 1)
    monkeypatch.setattr(event_folder, "frame_cache", lambda recordings, T, size: cached)
    recordings = cache.Recordings(root, tuple(root / f"{n}.aedat" for n in range(10000)), tuple([0] * 10000))
    monkeypatch.setattr(event_folder, "find", lambda root, classes: (recordings, [], []))
    splits = read(root)
    assert splits.notes == ()
    assert (len(splits.train), len(splits.val)) == (9000, 1000)
    assert not set(splits.train.indices) & set(splits.val.indices)


def test_second_load_reads_no_recording(tmp_path, monkeypatch):
    root = makers.cifar10_dvs(tmp_path)
    first = samples(read(root))
    monkeypatch.setattr(cache, "recording_to_frames", lambda *_: pytest.fail("decoded again"))
    for path in root.glob("extract/*/*.aedat"):
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = samples(read(root))
    assert all(torch.equal(a, b) and i == j for (a, i), (b, j) in zip(first, second, strict=True))


def test_each_number_of_frames_has_its_cache(tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    assert read(root, 2).train[0][0].shape[0] == 2
    assert read(root, 5).train[0][0].shape[0] == 5
    assert len(folders(root)) == 2
    assert folders(root)[0].name.startswith("number2_48x48_")


@pytest.mark.parametrize("change", ["more", "fewer", "renamed", "resized", "rewritten"])
def test_changed_folder_is_decoded_again(change, tmp_path):
    root = makers.cifar10_dvs(tmp_path, per_class=3)
    before = samples(read(root))
    path = root / "extract" / "cat" / "cifar10_cat_1.aedat"
    if change == "more":
        shutil.copy(path, path.with_name("cifar10_cat_9.aedat"))
    elif change == "fewer":
        path.unlink()
    elif change == "renamed":
        path.rename(path.with_name("cifar10_cat_9.aedat"))
    elif change == "resized":
        path.write_bytes(path.read_bytes()[:-80])
    else:
        write_aedat(path, makers.random_events(np.random.default_rng(99), 300))
    after = samples(read(root))
    assert len(folders(root)) == 2
    files = sorted(root.glob("extract/*/*.aedat"))
    assert len(after) == len(files) == len(before) + {"more": 1, "fewer": -1}.get(change, 0)
    for file, (frames, _) in zip(files, after, strict=True):
        assert np.array_equal(frames.numpy(), recording_to_frames(file, 3))


def test_items_are_fresh_and_writable(tmp_path):
    val = read(makers.cifar10_dvs(tmp_path)).val
    first = val[0][0]
    kept = first.clone()
    first.zero_()
    assert kept.any()
    assert torch.equal(val[0][0], kept)


def test_pickled_without_its_frames(tmp_path):
    train = read(makers.cifar10_dvs(tmp_path)).val
    frames, label = train[0]
    content = pickle.dumps(train)
    assert len(content) < 10_000
    again = pickle.loads(content)
    assert torch.equal(again[0][0], frames)
    assert again[0][1] == label


def test_through_a_worker(tmp_path):
    splits = read(makers.cifar10_dvs(tmp_path))
    frames, labels = next(iter(DataLoader(splits.train, batch_size=4, num_workers=1)))
    assert frames.shape == (4, 3, 2, 48, 48)
    assert labels.dtype == torch.int64


def test_race_without_locks(tmp_path, monkeypatch):
    """Three builders that all write at the same time leave one whole cache and no scraps."""
    root = makers.cifar10_dvs(tmp_path)
    barrier = threading.Barrier(3, timeout=60)
    write = cache._write

    def write_together(*arguments):
        barrier.wait()
        write(*arguments)
        barrier.wait()

    monkeypatch.setattr("seal_fast.train.disk.fcntl", None)
    monkeypatch.setattr(cache, "_write", write_together)
    recordings, missing, notes = event_folder.find(root, makers.DVS_CLASSES)
    assert not missing + notes
    results = []
    threads = [threading.Thread(target=lambda: results.append(cache.frame_cache(recordings, 3))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert [path.name for path in folders(root)] == [results[0].name]
    monkeypatch.setattr(cache, "_write", write)
    assert len(samples(read(root))) == 20


def test_locked_builders_decode_once(tmp_path, monkeypatch):
    root = makers.cifar10_dvs(tmp_path)
    count = []
    write = cache._write
    monkeypatch.setattr(cache, "_write", lambda *arguments: (count.append(1), write(*arguments)))
    recordings, _, _ = event_folder.find(root, makers.DVS_CLASSES)
    threads = [threading.Thread(target=cache.frame_cache, args=(recordings, 3)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == [1]


def test_processes_that_start_at_once(tmp_path):
    root = makers.cifar10_dvs(tmp_path, layout="download")
    code = (
        "import sys; from seal_fast.train.data import load\n"
        "splits = load('CIFAR10_DVS_SJ', sys.argv[1], role='teacher', time_steps=3)\n"
        "print(len(splits.train), len(splits.val), sum(float(frames.sum()) for frames, _ in splits.val))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("18 2 ")
    assert len(folders(root)) == 1
    assert not [path for path in root.rglob(".building-*")]


def test_failed_build_leaves_nothing(tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    path = root / "extract" / "ship" / "cifar10_ship_1.aedat"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    text = sentence(root)
    assert f"{path} is truncated" in text
    assert folders(root) == []
    path.write_bytes(content)
    assert len(read(root).train) == 18


@pytest.mark.parametrize("fault", ["frames cut", "no key", "labels gone", "other key"])
def test_damaged_cache_is_named(fault, tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    read(root)
    folder = folders(root)[0]
    if fault == "frames cut":
        (folder / "frames.npy").write_bytes((folder / "frames.npy").read_bytes()[:-4])
    elif fault == "other key":
        (folder / "key.json").write_text(json.dumps({"shape": [1], "files": ""}))
    else:
        (folder / {"no key": "key.json", "labels gone": "labels.npy"}[fault]).unlink()
    assert sentence(root) == f"{folder} is incomplete or was changed; delete {folder}, and it will be made again."
    shutil.rmtree(folder)
    assert len(read(root).train) == 18


def test_cache_cannot_be_written(tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    (root / cache.CACHE).write_text("a file where the folder belongs")
    assert sentence(root).startswith(f"{root / cache.CACHE}/number3_48x48_")
    assert sentence(root).endswith(" cannot be read: not a directory.")


def test_disk_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    root = makers.cifar10_dvs(tmp_path)
    monkeypatch.setattr(cache.np, "save", full)
    assert sentence(root).endswith(
        "cannot be written to (No space left on device); make room there, or copy the data to a folder where there is "
        "some."
    )
    assert folders(root) == []


def test_a_file_where_a_folder_is_to_be_written(tmp_path):
    """What is neither a lack of room nor of rights."""
    root = makers.cifar10_dvs(tmp_path, layout="download")
    (root / cache.CACHE).touch()
    assert sentence(root) == f"{root / cache.CACHE} cannot be written to (File exists)."


def test_missing_class(tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    shutil.rmtree(root / "extract" / "frog")
    text = sentence(root)
    assert text.startswith(f"{root}/extract has no recordings of frog: it holds airplane, automobile, ")
    assert "figshare" in text
    assert "SpikingJelly" in text
    assert not (root / cache.CACHE).exists()


def test_empty_root(tmp_path):
    assert f"{tmp_path} has no recordings of any class" in sentence(tmp_path)


def test_too_few_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(event_folder, "_MINIMUM", 21)
    assert "20 recordings, fewer than 21" in sentence(makers.cifar10_dvs(tmp_path))


def test_foreign_folders_are_left_alone(tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    (root / "extract" / "unicorn").mkdir()
    (root / "extract" / "unicorn" / "a.aedat").write_bytes(b"?")
    assert len(read(root).train) == 18


def test_unfinished_events_np_gives_way(tmp_path):
    """SpikingJelly was interrupted while it converted: what is complete is read."""
    root = makers.cifar10_dvs(tmp_path, layout="events_np")
    shutil.rmtree(root / "events_np" / "truck")
    makers.cifar10_dvs(tmp_path / "other", layout="download")
    (tmp_path / "other" / "download").rename(root / "download")
    assert len(read(root).train) == 18
    assert len(list((root / "extract").iterdir())) == 10


def test_unfinished_unpacking_goes_on(tmp_path):
    root = makers.cifar10_dvs(tmp_path, layout="download")
    read(root)
    shutil.rmtree(root / "extract" / "dog")
    kept = (root / "extract" / "cat").stat().st_mtime_ns
    assert len(read(root).train) == 18
    assert (root / "extract" / "cat").stat().st_mtime_ns == kept


@pytest.mark.parametrize("member", ["../evil.aedat", "/tmp/evil.aedat", "dog/../../evil.aedat", "..\\evil.aedat"])
def test_archive_that_reaches_outside(member, tmp_path):
    root = makers.cifar10_dvs(tmp_path / "root", layout="download")
    archive = root / "download" / "dog.zip"
    with zipfile.ZipFile(archive, "a") as content:
        content.writestr(member, b"evil")
    text = sentence(root)
    assert f"{archive} wants to unpack" in text
    assert "delete" not in text
    assert not list(tmp_path.rglob("*evil*"))


def test_broken_archive(tmp_path):
    root = makers.cifar10_dvs(tmp_path, layout="download")
    archive = root / "download" / "dog.zip"
    archive.write_bytes(archive.read_bytes()[:-40])
    assert sentence(root) == (
        f"{archive} is truncated or corrupt (File is not a zip file); delete it and download it again."
    )
    assert not (root / "extract" / "dog").exists()
    assert not list(root.rglob(".building-*"))


def test_missing_archive(tmp_path):
    root = makers.cifar10_dvs(tmp_path, layout="download")
    (root / "download" / "dog.zip").unlink()
    assert "no recordings of dog" in sentence(root)


def test_publish_leaves_the_first(tmp_path):
    for name in ("first", "second"):
        with publish.scratch_folder(tmp_path) as scratch:
            (scratch / "a").write_text(name)
            publish.publish(scratch, tmp_path / "place")
    assert (tmp_path / "place" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
