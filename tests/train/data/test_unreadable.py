"""What the system does not let this process read ends in one sentence, whichever file or folder it is."""

import codecs
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import makers
from processes import CONTEXT, DATA_MODULES
from seal_fast.train.data import DATASETS, DataError, load
from seal_fast.train.data.folders import not_found

NOBODY = 65534
ON_DISK = pytest.mark.parametrize("name", [name for name in DATASETS if name != "DIGITS"])
# Of each dataset, files and folders that are read: "" is its folder, and a cache is read where it is there already.
READ = {
    "CIFAR10": ["", "cifar-10-batches-py", "cifar-10-batches-py/batches.meta", "cifar-10-batches-py/data_batch_3"],
    "CIFAR100": ["", "cifar-100-python", "cifar-100-python/meta", "cifar-100-python/test"],
    "CIFAR10_DVS_SJ": [
        "",
        "extract",
        "extract/cat",
        "extract/cat/cifar10_cat_0.aedat",
        "seal_fast_frames",
        "seal_fast_frames/*/frames.npy",
        "seal_fast_frames/*/labels.npy",
        "seal_fast_frames/*/key.json",
    ],
    "imagenet": ["", "train", "val/n00000001", "val/n00000001/val_1.JPEG"],
    "MNIST": ["", "MNIST", "MNIST/raw", "MNIST/raw/t10k-labels-idx1-ubyte"],
    "DIGITS_DVS": ["", "extract", "extract/3", "extract/3/digit_3_0.aedat"],
}
FILES = [(name, path) for name, paths in READ.items() for path in paths if "." in path or "_" in Path(path).name]
FILES = [(name, path) for name, path in FILES if path not in ("cifar-10-batches-py", "seal_fast_frames")]


def read_all(name, root):
    """Load a dataset and read its samples; the sentence, or None if all went well."""
    try:
        splits = load(name, root, role="student", time_steps=2)
        for part in (splits.train, splits.val):
            for index in range(len(part)):
                part[index]
    except DataError as error:
        return error.sentence
    return None


def as_nobody(name, root, results):
    for module in DATA_MODULES:  # while they may be read
        importlib.import_module(module)
    codecs.lookup("cp437")  # of names in archives
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    results.put(read_all(name, root))


def with_little_memory(name, root, results):
    import resource

    for module in DATA_MODULES:
        importlib.import_module(module)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, size + 2**29))
    results.put(read_all(name, root))


def sentence_of_nobody(name, root, target=as_nobody):
    """What a user without rights, or one with another lack, is told, or None."""
    results = CONTEXT.SimpleQueue()
    process = CONTEXT.Process(target=target, args=(name, root, results), daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return results.get()


@pytest.fixture
def public():
    """A folder that every user may read and write; those above `tmp_path` are its owner's alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o777)
    shutil.rmtree(folder)


def spread(folder):
    """Let every user read and write a folder."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)


def place_of(name, path, root):
    """The path under a data folder that is filled; where it is in a cache, with that cache."""
    makers.SETS[name](root)
    if "frames" in path:
        assert read_all(name, root) is None
    return next(root.glob(path)) if path else root


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="this system has no users to become")
@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in READ.items() for path in paths])
def test_permission_denied(name, path, public):
    root = public / "data"
    root.mkdir()
    place = place_of(name, path, root)
    spread(public)
    place.chmod(0)
    sentence = sentence_of_nobody(name, root)
    assert sentence.startswith(str(place))
    assert sentence.endswith(" cannot be read: permission denied.")
    assert "\n" not in sentence


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="this system has no users to become")
@pytest.mark.parametrize("scrap", ["seal_fast_frames/.lock", ".building-1/a", None])
def test_what_is_built_is_read_where_nothing_can_be_written(scrap, public):
    root = public / "data"
    place_of("CIFAR10_DVS_SJ", "seal_fast_frames/*/frames.npy", root)
    if scrap is not None:
        (root / scrap).parent.mkdir(exist_ok=True)
        (root / scrap).touch()
    for path in (public, *public.rglob("*")):
        path.chmod(0o555)
    assert sentence_of_nobody("CIFAR10_DVS_SJ", root) is None


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="this system has no users to become")
@pytest.mark.parametrize("layout", ["extract", "download"])
def test_a_folder_that_cannot_be_written(layout, public):
    root = makers.cifar10_dvs(public / "data", layout=layout)
    for path in (public, *public.rglob("*")):
        path.chmod(0o555)
    sentence = sentence_of_nobody("CIFAR10_DVS_SJ", root)
    assert sentence.startswith(f"{root}/seal_fast_frames cannot be written to (Permission denied); allow writing there")
    assert "make room" not in sentence


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and whose reading fails")
@pytest.mark.parametrize(("name", "path"), FILES)
def test_input_output_error(name, path, tmp_path):
    """No process has memory at address 0."""
    place = place_of(name, path, tmp_path)
    place.unlink()
    place.symlink_to("/proc/self/mem")
    named = place.parent if "frames" in path else place
    sentence = read_all(name, tmp_path)
    assert sentence is not None
    assert sentence.startswith(str(named))
    assert sentence.endswith(" cannot be read: input/output error.")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the memory of a process")
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("CIFAR10", "cifar-10-batches-py/data_batch_3"),
        ("CIFAR10_DVS_SJ", "extract/cat/cifar10_cat_0.aedat"),
        ("MNIST", "MNIST/raw/t10k-images-idx3-ubyte"),
    ],
)
def test_not_enough_memory(name, path, tmp_path):
    place = place_of(name, path, tmp_path)
    os.truncate(place, 2**31)
    assert sentence_of_nobody(name, tmp_path, with_little_memory) == f"{place} cannot be read: not enough memory."


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and whose reading fails")
def test_archive_on_a_failing_disk(tmp_path):
    root = makers.cifar10_dvs(tmp_path, layout="download")
    archive = root / "download/dog.zip"
    archive.unlink()
    archive.symlink_to("/proc/self/mem")
    sentence = f"{archive} cannot be read: input/output error."
    assert read_all("CIFAR10_DVS_SJ", root) == sentence
    (makers.cifar10_dvs(tmp_path / "other") / "extract/dog").rename(root / "extract/dog")
    splits = load("CIFAR10_DVS_SJ", root, role="student", time_steps=2)
    assert splits.notes[0] == f"{sentence.rstrip('.')}; the 2 recordings in {root}/extract/dog are used."


@ON_DISK
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("file", "not a directory"), ("long", "file name too long"), ("loop", "too many levels of symbolic links")],
)
def test_a_root_that_cannot_be_looked_up(kind, reason, name, tmp_path):
    root = tmp_path / {"file": "file/data", "long": "x" * 300, "loop": "loop"}[kind]
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert read_all(name, root) == f"{root} cannot be read: {reason}."


@ON_DISK
def test_root_is_a_file(name, tmp_path):
    root = tmp_path / "data.tar.gz"
    root.touch()
    assert read_all(name, root) == f"{root} is no folder; name the folder that holds the data."


@ON_DISK
def test_root_is_a_link_to_nothing(name, tmp_path):
    root = tmp_path / "data"
    root.symlink_to(tmp_path / "gone")
    assert read_all(name, root) == f"{root} is a link to {tmp_path}/gone, which is missing; name another folder."


@ON_DISK
def test_home_of_nobody(name):
    assert read_all(name, "~no-such-user/data") == "~no-such-user/data cannot be read: there is no such user."


@pytest.mark.parametrize("name", ["CIFAR10_DVS_SJ", "DIGITS_DVS"])
def test_a_link_to_nothing_is_no_reason_to_leave_a_recording_out(name, tmp_path):
    makers.SETS[name](tmp_path)
    path = sorted(tmp_path.glob("extract/*/*"))[3]
    path.unlink()
    path.symlink_to(tmp_path / "annex")
    assert read_all(name, tmp_path) == f"{path} cannot be read: no such file or directory."


def test_what_may_have_been_meant_may_be_unreadable(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    error = not_found(tmp_path, "has no x", "get it", lambda folder: True)
    assert "did you mean" in error.sentence
    error = not_found(tmp_path, "has no x", "get it", lambda folder: (folder / "x" / ("y" * 300)).is_dir())
    assert error.sentence == f"{tmp_path} has no x: it holds loop; get it."
