"""Which recordings are read where several layouts hold some, and what archives mend."""

import os
import shutil
import threading
import uuid
import zipfile
from pathlib import Path

import pytest

import makers
from seal_fast.train.data import DataError, load, publish, recordings
from seal_fast.train.data.aedat import Events, read_aedat, write_aedat
from seal_fast.train.data.recordings import find

CLASSES = makers.DVS_CLASSES


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Thirty recordings of each class, unpacked."""
    return makers.cifar10_dvs(tmp_path_factory.mktemp("whole"), per_class=30, events=5)


def pack(source, archive, class_name, name="{class_name}/{file}", extra=()):
    """Pack a class's recordings under these names."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as content:
        for path in sorted((source / class_name).iterdir()):
            # Not by write or writestr with a name, which turn backslashes round on some systems.
            member = zipfile.ZipInfo("x")
            member.filename = name.format(class_name=class_name, file=path.name)
            content.writestr(member, path.read_bytes())
        for member in extra:
            content.writestr(member, b"")


def pack_all(source, folder, **options):
    for class_name in CLASSES:
        pack(source, folder / f"{class_name}.zip", class_name, **options)


@pytest.fixture
def root(tmp_path, whole):
    """A folder with the archives of all classes in download."""
    pack_all(whole / "extract", tmp_path / "download")
    return tmp_path


def found(root):
    """Content of the recordings by class and name, and the notes."""
    taken, missing, notes = find(root, CLASSES)
    assert missing == []
    assert [CLASSES[label] for label in taken.labels] == [path.parent.name for path in taken.files]
    names = [(path.parent.name, path.stem) for path in taken.files]
    assert names == sorted(names)
    return {(path.parent.name, path.name): path.read_bytes() for path in taken.files}, notes


def expected(whole):
    return {(path.parent.name, path.name): path.read_bytes() for path in whole.glob("extract/*/*")}


def state(folder):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_few_converted_recordings_do_not_hide_many(tmp_path, whole):
    makers.cifar10_dvs(tmp_path, per_class=2, layout="events_np")
    shutil.copytree(whole / "extract", tmp_path / "extract")
    content, notes = found(tmp_path)
    assert content == expected(whole)
    left = f"the 20 in {tmp_path}/events_np are left out."
    assert notes == [f"300 recordings are read from {tmp_path}/extract; {left}"]


def test_notes_come_with_the_splits(tmp_path):
    makers.cifar10_dvs(tmp_path, per_class=3)
    makers.cifar10_dvs(tmp_path, per_class=2, layout="flat")
    splits = load("CIFAR10_DVS_SJ", tmp_path, role="student", time_steps=2)
    assert len(splits.train) + len(splits.val) == 30
    assert splits.notes == (
        f"30 recordings are read from {tmp_path}/extract; the 20 in {tmp_path} are left out.",
        f"{tmp_path} has 30 recordings, where all of CIFAR10-DVS has 10,000.",
    )


def test_all_classes_go_before_more_recordings(tmp_path, whole):
    shutil.copytree(whole / "extract", tmp_path / "extract")
    shutil.rmtree(tmp_path / "extract" / "truck")
    makers.cifar10_dvs(tmp_path, per_class=2, layout="flat")
    assert len(found(tmp_path)[0]) == 20


@pytest.mark.parametrize("layout", ["extract", "flat"])
def test_of_equal_layouts_the_first_is_read(layout, tmp_path):
    makers.cifar10_dvs(tmp_path, layout=layout)
    (tmp_path / "other").mkdir()
    makers.cifar10_dvs(tmp_path / "other", layout="events_np")
    (tmp_path / "other" / "events_np").rename(tmp_path / "events_np")
    recordings, _, notes = find(tmp_path, CLASSES)
    assert {path.suffix for path in recordings.files} == {".npz"}
    assert notes == []


def test_a_folder_of_converted_recordings_is_the_root(tmp_path):
    root = makers.cifar10_dvs(tmp_path, layout="events_np")
    assert len(find(root / "events_np", CLASSES)[0].files) == 20


@pytest.mark.parametrize("layout", ["events_np", "extract", "flat"])
def test_archives_that_hold_more_are_unpacked(layout, root, whole):
    makers.cifar10_dvs(root, per_class=2, events=5, layout=layout)
    content, notes = found(root)
    assert content.keys() == expected(whole).keys()
    assert any("the 20 in" in note for note in notes) == (layout == "events_np")


def test_archives_that_hold_more_of_fewer_classes_are_told(root):
    (root / "download/truck.zip").unlink()
    makers.cifar10_dvs(root, per_class=2, layout="events_np")
    content, notes = found(root)
    assert len(content) == 20
    assert notes == [f"20 recordings are read from {root}/events_np; the 270 in zip archives are left out."]
    assert not (root / "extract").exists()


def test_archives_that_hold_less_are_left_alone(tmp_path, whole):
    shutil.copytree(whole / "extract", tmp_path / "extract")
    pack_all(makers.cifar10_dvs(tmp_path / "few", per_class=2, events=5) / "extract", tmp_path / "download")
    before = state(tmp_path / "extract")
    assert found(tmp_path) == (expected(whole), [])
    assert state(tmp_path / "extract") == before


def test_a_recording_that_its_owner_has_shortened_stays(root, whole):
    """It is not the beginning of the one in the archive, as an interrupted unpacking would have left it."""
    shutil.copytree(whole / "extract", root / "extract")
    path = root / "extract/cat/cifar10_cat_7.aedat"
    events = read_aedat(path)
    write_aedat(path, Events(*(array[1:] for array in events)))
    before = state(root / "extract")
    assert found(root)[1] == []
    assert state(root / "extract") == before


def test_two_loads_at_once_unpack_once(root, whole, monkeypatch):
    unpacked, real, together = [], recordings._unpack, threading.Barrier(2)

    def unpack(archive, *rest):
        unpacked.append(archive.path.stem)
        return real(archive, *rest)

    monkeypatch.setattr(recordings, "_unpack", unpack)
    results = []
    threads = [threading.Thread(target=lambda: (together.wait(), results.append(found(root)[0]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected(whole)] * 2
    assert sorted(unpacked) == sorted(CLASSES)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs the paths of open files")
def test_recordings_are_on_the_disk_before_they_have_their_names(root, monkeypatch):
    """Each recording and the scratch folder before, and the class folder with the new names after."""
    calls, fsync, replace = [], os.fsync, os.replace
    path_of = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.readlink(path_of(handle))), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append((str(old), str(new))), replace(old, new)))
    find(root, CLASSES)
    renames = [(number, call) for number, call in enumerate(calls) if isinstance(call, tuple)]
    assert len(renames) == 300
    for number, (scratch, recording) in renames:
        assert {scratch, os.path.dirname(scratch)} <= set(calls[:number])
        assert os.path.dirname(recording) in calls[number:]
    assert str(root / "extract") in calls  # has the names of the class folders
    assert str(root) in calls


@pytest.mark.parametrize("link", ["extract", "extract/cat"])
def test_recordings_on_another_disk_are_unpacked_there(link, root, whole):
    elsewhere = Path("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp") / f"seal-fast-{uuid.uuid4().hex}"
    if os.stat(elsewhere.parent).st_dev == os.stat(root).st_dev:
        pytest.skip("there is no second file system to write to")
    elsewhere.mkdir()
    try:
        (root / link).parent.mkdir(exist_ok=True)
        (root / link).symlink_to(elsewhere)
        assert found(root)[0] == expected(whole)
        assert not [path for path in elsewhere.rglob(".*")]
    finally:
        shutil.rmtree(elsewhere)


def test_what_was_left_on_another_disk_is_removed_by_the_next(root):
    scrap = root / "extract" / "cat" / f".building-{uuid.uuid4().hex}"
    scrap.mkdir(parents=True)
    (root / publish.CACHE).mkdir()
    (root / publish.CACHE / ".lock").touch()
    find(root, CLASSES)
    assert not scrap.exists()


def test_a_folder_that_only_looks_like_one_of_a_build_stays(tmp_path):
    for name in (".building-site", ".building-" + 31 * "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").touch()
    with publish.one_at_a_time(tmp_path):
        pass
    publish.clean(tmp_path)
    assert len(list(tmp_path.rglob("thesis.txt"))) == 2


def test_a_second_archive_is_taken_where_the_first_is_of_no_use(root, whole):
    shutil.copy(root / "download/dog.zip", root / "dog.zip")
    spoil(root / "download/dog.zip", "corrupt")
    content, notes = found(root)
    assert content == expected(whole)
    assert notes == []


@pytest.mark.parametrize("layout", ["extract", "."])
def test_a_class_that_was_half_unpacked_is_completed(layout, root, whole):
    """Five of thirty are there, the last of them cut."""
    shutil.copytree(whole / "extract", root / layout, dirs_exist_ok=True)
    truck = sorted((root / layout / "truck").iterdir())
    for path in truck[5:]:
        path.unlink()
    truck[4].write_bytes(truck[4].read_bytes()[:-8])
    own = root / layout / "truck" / "mine.aedat"
    shutil.copy(truck[0], own)
    before = state(root / layout)
    content, notes = found(root)
    assert content == {**expected(whole), ("truck", "mine.aedat"): truck[0].read_bytes()}
    folder = os.path.normpath(root / layout / "truck")
    were = "recordings, which were missing or incomplete, were"
    assert notes == [f"26 {were} unpacked from {root}/download/truck.zip into {folder}."]
    after = state(root / layout)
    assert {path for path in before if before[path] != after[path]} == {truck[4]}
    assert found(root) == (content, [])
    assert state(root / layout) == after


def test_one_recording(root, whole):
    shutil.copytree(whole / "extract", root / "extract")
    (root / "extract/cat/cifar10_cat_7.aedat").unlink()
    was = "1 recording, which was missing or incomplete, was"
    assert found(root)[1] == [f"{was} unpacked from {root}/download/cat.zip into {root}/extract/cat."]


@pytest.mark.parametrize("size", [0, 20])
def test_nothing_is_unpacked_over_a_longer_recording(size, root, whole):
    shutil.copytree(whole / "extract", root / "extract")
    path = root / "extract/cat/cifar10_cat_7.aedat"
    longer = path.read_bytes() + bytes(size)
    path.write_bytes(longer)
    assert found(root)[1] == []
    assert path.read_bytes() == longer


@pytest.mark.parametrize("fault", ["cut", "corrupt", "html", "folder", "encrypted", "other class"])
def test_an_archive_of_no_use_gives_way_to_what_is_unpacked(fault, root, whole):
    shutil.copytree(whole / "extract", root / "extract")
    for path in sorted((root / "extract/dog").iterdir())[20:]:
        path.unlink()
    sentence = spoil(root / "download/dog.zip", fault)
    content, notes = found(root)
    assert len(content) == 290
    why = sentence.partition(";")[0].rstrip(".")
    assert notes == [f"{why}; the 20 recordings in {root}/extract/dog are used."]
    assert not list(root.rglob(".building-*"))
    shutil.rmtree(root / "extract/dog")
    with pytest.raises(DataError) as caught:
        find(root, CLASSES)
    assert caught.value.sentence == sentence


def spoil(archive, fault):
    """Replace an archive by something of no use, and say how that is told."""
    if fault == "cut":
        archive.write_bytes(archive.read_bytes()[:-40])
        return f"{archive} is truncated or corrupt (File is not a zip file); delete it and download it again."
    if fault == "corrupt":
        with zipfile.ZipFile(archive) as content:
            member = content.getinfo("dog/cifar10_dog_9.aedat")
        changed = bytearray(archive.read_bytes())
        changed[member.header_offset + 30 + len(member.filename) + 70] ^= 1
        archive.write_bytes(changed)
        reason = f"Bad CRC-32 for file {member.filename!r}"
        return f"{archive} is truncated or corrupt ({reason}); delete it and download it again."
    if fault == "html":
        archive.write_bytes(b"<html>404</html>")
        return f"{archive} is no zip archive: it begins with b'<htm' instead of b'PK'."
    if fault == "folder":
        with zipfile.ZipFile(archive, "w") as content:
            content.writestr("README.txt", b"")
        return f"{archive} holds no .aedat recordings of dog: it holds README.txt."
    if fault == "encrypted":
        changed = bytearray(archive.read_bytes())
        position = changed.find(b"PK\x01\x02")
        while position >= 0:  # the flag in each entry of the directory
            changed[position + 8] |= 1
            position = changed.find(b"PK\x01\x02", position + 4)
        archive.write_bytes(changed)
        return f"{archive} is encrypted; unpack it yourself."
    shutil.copy(archive.with_name("cat.zip"), archive)
    return f"{archive} holds recordings of cat (cat/cifar10_cat_0.aedat) instead of dog."


NAMES = ["{file}", "CIFAR10-DVS/{class_name}/{file}", "a/b/{file}", "{class_name}\\{file}", "x\\{class_name}\\{file}"]


@pytest.mark.parametrize("place", ["download", "."])
@pytest.mark.parametrize("name", NAMES)
def test_names_inside_archives(name, place, tmp_path, whole):
    extra = ("__MACOSX/._a.aedat", "._b.aedat", ".hidden/c.aedat", "Thumbs.db", "folder.aedat/")
    pack_all(whole / "extract", tmp_path / place, name=name, extra=extra)
    assert found(tmp_path) == (expected(whole), [])


@pytest.mark.parametrize(
    "member", ["../evil.aedat", "/evil.aedat", "dog\\..\\..\\evil.aedat", "C:\\evil.aedat", "../x"]
)
def test_members_that_reach_outside(member, root):
    with zipfile.ZipFile(root / "download/dog.zip", "a") as content:
        content.writestr(zipfile.ZipInfo(member), b"evil")
    with pytest.raises(DataError, match=r"wants to unpack .* outside its folder") as caught:
        find(root, CLASSES)
    assert "delete" not in caught.value.sentence
    assert not list(root.parent.rglob("*evil*"))


def test_two_recordings_of_one_name(root):
    with zipfile.ZipFile(root / "download/dog.zip", "a") as content:
        content.writestr("dog/other/cifar10_dog_1.aedat", b"other")
    with pytest.raises(DataError, match=r"dog\.zip holds two recordings of one name"):
        find(root, CLASSES)


def test_of_two_archives_the_fuller_is_read(root, whole):
    few = makers.cifar10_dvs(root / "few", per_class=2)
    pack(few / "extract", root / "dog.zip", "dog")
    assert len(found(root)[0]) == 300
    (root / "download/dog.zip").rename(root / "dog.zip")
    pack(few / "extract", root / "download/dog.zip", "dog")
    shutil.rmtree(root / "extract")
    assert len(found(root)[0]) == 300


@pytest.mark.parametrize("name", ["._x.aedat", ".ipynb_checkpoints/x.aedat", "Thumbs.db", "desktop.ini"])
@pytest.mark.parametrize("layout", ["extract", "flat"])
def test_hidden_files_are_no_recordings(layout, name, tmp_path):
    root = makers.cifar10_dvs(tmp_path, layout=layout)
    before = found(root)
    folder = root / ("extract" if layout == "extract" else ".") / "cat"
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "cifar10_cat_0.aedat", folder / name)
    assert found(root) == before
    for path in folder.glob("cifar*"):
        path.unlink()
    assert find(root, CLASSES)[1] == ["cat"]


@pytest.mark.parametrize("make", ["extract", "events_np", "download"])
def test_root_is_one_level_too_high(make, tmp_path):
    root = makers.cifar10_dvs(tmp_path / "dvs", layout=make)
    with pytest.raises(DataError) as caught:
        load("CIFAR10_DVS_SJ", tmp_path, role="student", time_steps=2)
    assert caught.value.sentence == (
        f"{tmp_path} has no recordings of any class: it holds dvs; did you mean --data_path {root}?"
    )


def test_another_layout_is_named(tmp_path):
    for name in ("a.zip", "b.aedat", ".hidden"):
        (tmp_path / name).touch()
    with pytest.raises(
        DataError, match=r"has no recordings of any class: it holds a\.zip, b\.aedat; put the ten zip files"
    ):
        load("CIFAR10_DVS_SJ", tmp_path, role="student", time_steps=2)
