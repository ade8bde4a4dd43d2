import pickle
import sys
from collections import OrderedDict
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from torchvision import datasets

import makers
from seal_fast.train.data import DataError, load

FOLDER = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}
TRAIN = {"CIFAR10": "data_batch_2", "CIFAR100": "train"}
META = {"CIFAR10": "batches.meta", "CIFAR100": "meta"}
MAKE = {"CIFAR10": makers.cifar10, "CIFAR100": makers.cifar100}
NAMES = pytest.mark.parametrize("name", FOLDER)


def read(name, root):
    return load(name, root, role="teacher", time_steps=4)


def sentence(name, root):
    with pytest.raises(DataError) as caught:
        read(name, root)
    text = caught.value.sentence
    assert "\n" not in text
    # What is no proof of damage is no reason to delete, nor to have torchvision write over what is there.
    broken = any(words in text for words in ("truncated or corrupt",))
    assert ("delete" in text) == broken
    how_to_get = f'torchvision.datasets.{name}("{root}", download=True)'
    assert (how_to_get in text) == (broken or any(words in text for words in ("is missing", "has no folder")))
    return text


def change(path, **entries):
    content = {**pickle.loads(path.read_bytes(), encoding="latin1"), **entries}
    path.write_bytes(pickle.dumps(content, protocol=4))


@NAMES
def test_equals_torchvision(name, tmp_path, monkeypatch):
    """The same images, labels and names as torchvision's own reader, its checksums aside."""
    MAKE[name](tmp_path)
    monkeypatch.setattr(getattr(datasets, name), "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    splits = read(name, tmp_path)
    for part, train in ((splits.train, True), (splits.val, False)):
        expected = getattr(datasets, name)(str(tmp_path), train=train)
        assert np.array_equal(part.images, expected.data)
        assert part.images.dtype == np.uint8
        assert part.labels.tolist() == expected.targets
        assert list(splits.classes) == expected.classes


@pytest.mark.parametrize("style", ["bytes", "str"])
@NAMES
def test_styles_of_pickle(name, style, tmp_path):
    published = read(name, MAKE[name](tmp_path / "a"))
    other = read(name, MAKE[name](tmp_path / "b", style=style))
    assert np.array_equal(published.train.images, other.train.images)
    assert np.array_equal(published.val.labels, other.val.labels)
    assert published.classes == other.classes


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_protocols(protocol, tmp_path):
    root = makers.cifar10(tmp_path)
    before = read("CIFAR10", root).train.images
    path = root / FOLDER["CIFAR10"] / TRAIN["CIFAR10"]
    content = pickle.loads(path.read_bytes(), encoding="latin1")
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert np.array_equal(read("CIFAR10", root).train.images, before)


def test_val_is_normalised(tmp_path):
    splits = read("CIFAR10", makers.cifar10(tmp_path))
    val = splits.val
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    expected = (torch.from_numpy(val.images[3]).permute(2, 0, 1) / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(splits.finish_val(val[3][0][None])[0], expected, rtol=0, atol=0)


@NAMES
def test_missing_folder(name, tmp_path):
    assert f"{tmp_path} has no folder {FOLDER[name]}" in sentence(name, tmp_path)


@pytest.mark.parametrize("files", [TRAIN, META])
@NAMES
def test_missing_file(name, files, tmp_path):
    path = MAKE[name](tmp_path) / FOLDER[name] / files[name]
    path.unlink()
    assert f"{path} is missing" in sentence(name, tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
@NAMES
def test_truncated_file(name, keep, tmp_path):
    path = MAKE[name](tmp_path) / FOLDER[name] / TRAIN[name]
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert f"{path} is truncated or corrupt" in sentence(name, tmp_path)


@pytest.mark.parametrize("content", [b"\x80\x02", b"<html>404</html>", bytes(100), b"\x80\x02]q\x00."])
@NAMES
def test_corrupt_file(name, content, tmp_path):
    path = MAKE[name](tmp_path) / FOLDER[name] / TRAIN[name]
    path.write_bytes(content)
    assert str(path) in sentence(name, tmp_path)


@pytest.mark.parametrize("wrong", [-1, 100, 255])
@NAMES
def test_label_out_of_range(name, wrong, tmp_path):
    path = MAKE[name](tmp_path) / FOLDER[name] / TRAIN[name]
    key = {"CIFAR10": "labels", "CIFAR100": "fine_labels"}[name]
    labels = pickle.loads(path.read_bytes(), encoding="latin1")[key]
    change(path, **{key: [wrong, *labels[1:]]})
    assert f"{path} holds the label {wrong}" in sentence(name, tmp_path)


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"labels": [1, 2]}, "8 images and 2 labels"),
        ({"labels": [1, 2, 1.5, 2.5] * 2}, "holds the label 1.5, where whole numbers are expected"),
        ({"labels": np.array([1.0] * 8)}, "holds the label 1.0, where whole numbers are expected"),
        ({"labels": [1, np.float32(2)] * 4}, "holds the label np.float32(2.0), where whole numbers are expected"),
        ({"labels": ["a\nb"] * 8}, r"holds the label 'a\nb', where whole numbers are expected"),
        ({"labels": [np.ones((2, 1))] * 8}, "holds the label array([[1.], [1.]]), where whole numbers are expected"),
        ({"labels": [None] * 8}, "holds the label None, where whole numbers are expected"),
        ({"labels": "01234567"}, "holds a str as labels"),
        ({"labels": np.array(5)}, "holds an array of int64 and shape [] as labels"),
        ({"labels": np.zeros((8, 1), np.int64)}, "holds an array of int64 and shape [8, 1] as labels"),
        ({"labels": None}, "holds nothing as labels"),
        ({"data": np.zeros((8, 3072), np.float32)}, "holds an array of float32 and shape [8, 3072] as data"),
        ({"data": np.zeros((8, 3000), np.uint8)}, "where images as uint8 [N, 3072] are expected"),
        ({"data": np.zeros((), np.uint8)}, "holds an array of uint8 and shape [] as data"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "0 images"),
        ({"data": None}, "holds nothing as data"),
    ],
)
def test_wrong_content(entries, fault, tmp_path):
    path = makers.cifar10(tmp_path) / FOLDER["CIFAR10"] / TRAIN["CIFAR10"]
    change(path, **entries)
    text = sentence("CIFAR10", tmp_path)
    assert str(path) in text
    assert fault in text


def test_wrong_meta(tmp_path):
    path = makers.cifar10(tmp_path) / FOLDER["CIFAR10"] / META["CIFAR10"]
    change(path, label_names=["cat", "dog"])
    assert f"{path} holds 2 names as label_names, where 10 names of classes are expected" in sentence(
        "CIFAR10", tmp_path
    )


class Payload:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", [TRAIN, META])
def test_a_pickle_runs_no_code(where, protocol, tmp_path):
    root = makers.cifar10(tmp_path)
    path = root / FOLDER["CIFAR10"] / where["CIFAR10"]
    mark = tmp_path / "mark"
    content = pickle.dumps({"data": Payload(open, str(mark), "w")}, protocol=protocol)
    path.write_bytes(content)
    text = sentence("CIFAR10", root)
    assert text.startswith(f"{path} asks for ")
    assert text.endswith("so it was not read; save it again with a plain dict, lists and arrays.")
    assert "io.open" in text or "builtins.open" in text or "_io.open" in text
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # the payload does work where nothing stops it


@pytest.mark.parametrize("value", [np.array([object], dtype=object), np.array([(1, None)], dtype="i4,O")])
def test_arrays_of_objects_are_refused(value, tmp_path):
    path = makers.cifar10(tmp_path) / FOLDER["CIFAR10"] / TRAIN["CIFAR10"]
    change(path, data=value)
    assert f"{path} asks for" in sentence("CIFAR10", tmp_path)


@pytest.mark.parametrize("form", ["list of scalars", "array", "int32 array", "tuple"])
@pytest.mark.parametrize("protocol", [2, 4, 5, "python2"])
@NAMES
def test_labels_as_numpy_numbers(name, protocol, form, tmp_path):
    root = MAKE[name](tmp_path)
    before = read(name, root).train.labels
    path = root / FOLDER[name] / TRAIN[name]
    key = {"CIFAR10": "labels", "CIFAR100": "fine_labels"}[name]
    content = pickle.loads(path.read_bytes(), encoding="latin1")
    labels = content[key]
    content[key] = {
        "list of scalars": [np.int64(label) for label in labels],
        "array": np.array(labels),
        "int32 array": np.array(labels, np.int32),
        "tuple": tuple(labels),
    }[form]
    if protocol == "python2":
        path.write_bytes(makers._pickled({name.encode(): value for name, value in content.items()}, protocol))
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    after = read(name, root).train.labels
    assert np.array_equal(after, before)
    assert after.dtype == np.int64


class OfObjects:
    """Asks for a numpy scalar of a Python object, whose bytes would be an address."""

    def __reduce__(self):
        scalar = np.int64(1).__reduce__()[0]
        return scalar, (np.dtype(object), b"\x10" * 8)


class TooLong:
    def __reduce__(self):
        scalar = np.int64(1).__reduce__()[0]
        return scalar, (np.dtype(np.int64), b"\x10" * 800)


@pytest.mark.parametrize("value", [OfObjects(), TooLong(), np.void(b"12345678"), np.datetime64(3, "s")])
def test_scalars_that_are_no_numbers_are_refused(value, tmp_path):
    path = makers.cifar10(tmp_path) / FOLDER["CIFAR10"] / TRAIN["CIFAR10"]
    change_raw(path, value)
    assert f"{path} asks for" in sentence("CIFAR10", tmp_path)


def change_raw(path, value):
    content = pickle.loads(path.read_bytes(), encoding="latin1")
    path.write_bytes(pickle.dumps({**content, "labels": [value]}, protocol=2))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "names", [Path("a/b.png"), PureWindowsPath("a/b.png"), np.str_("b.png"), np.str_(""), np.bytes_(b"b.png")]
)
def test_names_of_files_of_any_kind(names, protocol, tmp_path):
    root = makers.cifar10(tmp_path)
    before = read("CIFAR10", root).train
    path = root / FOLDER["CIFAR10"] / TRAIN["CIFAR10"]
    content = pickle.loads(path.read_bytes(), encoding="latin1")
    content["filenames"] = [names] * 8
    path.write_bytes(pickle.dumps(OrderedDict(content), protocol=protocol))
    after = read("CIFAR10", root).train
    assert np.array_equal(after.images, before.images)
    assert np.array_equal(after.labels, before.labels)


def test_names_of_classes_as_numpy_text(tmp_path):
    root = makers.cifar10(tmp_path)
    before = read("CIFAR10", root).classes
    change(root / FOLDER["CIFAR10"] / META["CIFAR10"], label_names=[np.str_(name) for name in before])
    assert read("CIFAR10", root).classes == before


def test_a_pickle_that_needs_more_memory_than_there_is(tmp_path):
    path = makers.cifar10(tmp_path) / FOLDER["CIFAR10"] / TRAIN["CIFAR10"]
    change(path, data=Payload(np.empty(0).__reduce__()[0], np.ndarray, (10**15,), b"b"))
    assert sentence("CIFAR10", tmp_path) == f"{path} cannot be read: not enough memory."


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count a process's memory in other units, or not")
@pytest.mark.parametrize("operation", [b"r\x00\x00\x00\x10", b"p268435456\n"])
def test_a_pickle_that_makes_the_memo_grow(operation, tmp_path):
    """The unpickler makes room for two pointers for each place up to the one that is named, 4 GiB here."""
    import resource

    path = makers.cifar10(tmp_path) / FOLDER["CIFAR10"] / TRAIN["CIFAR10"]
    content = path.read_bytes()
    path.write_bytes(content[:3] + operation + content[3:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert f"{path} is truncated or corrupt (" in sentence("CIFAR10", tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB


@NAMES
def test_a_renamed_folder_of_the_batches(name, tmp_path):
    """What torchvision downloads as it is told is what is read then."""
    root = tmp_path / "mine"
    (MAKE[name](tmp_path) / FOLDER[name]).rename(root)
    (root / META[name]).unlink()
    assert f"{root / META[name]} is missing" in sentence(name, root)
    MAKE[name](root)
    assert len(read(name, root).classes) == {"CIFAR10": 10, "CIFAR100": 100}[name]


@NAMES
def test_root_is_the_folder_of_the_batches(name, tmp_path):
    root = MAKE[name](tmp_path)
    before, after = read(name, root), read(name, root / FOLDER[name])
    assert np.array_equal(before.train.images, after.train.images)
    (root / FOLDER[name] / META[name]).unlink()
    with pytest.raises(DataError) as caught:
        read(name, root / FOLDER[name])
    assert f'torchvision.datasets.{name}("{root}", download=True)' in caught.value.sentence


@NAMES
def test_packed(name, tmp_path):
    root = tmp_path / "my data"
    root.mkdir()
    archive = {"CIFAR10": "cifar-10-python.tar.gz", "CIFAR100": "cifar-100-python.tar.gz"}[name]
    (root / archive).touch()
    with pytest.raises(DataError) as caught:
        read(name, root)
    command = f"tar -xzf '{root}/{archive}' -C '{root}'"
    assert caught.value.sentence == (
        f"{root} has no folder {FOLDER[name]}: it holds {archive}; unpack it with: {command}."
    )


@pytest.mark.parametrize(
    ("name", "folder", "kind"),
    [
        ("CIFAR10", "cifar-10-batches-bin", "binary"),
        ("CIFAR10", "cifar-10-batches-mat", "MATLAB"),
        ("CIFAR100", "cifar-100-binary", "binary"),
        ("CIFAR100", "cifar-100-matlab.tar.gz", "MATLAB"),
    ],
)
def test_other_versions(name, folder, kind, tmp_path):
    (tmp_path / folder).mkdir()
    text = sentence(name, tmp_path)
    assert f"it holds {folder}; {folder} is the {kind} version, and the Python version is read: get it with" in text


@NAMES
def test_root_is_one_level_too_high_or_too_low(name, tmp_path):
    root = MAKE[name](tmp_path / "data")
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(DataError) as caught:
        read(name, tmp_path)
    assert caught.value.sentence == (
        f"{tmp_path} has no folder {FOLDER[name]}: it holds data; did you mean --data_path {root}?"
    )
    (root / "other").mkdir()
    with pytest.raises(DataError) as caught:
        read(name, root / "other")
    assert caught.value.sentence == (
        f"{root / 'other'} has no folder {FOLDER[name]}: it is empty; did you mean --data_path {root}?"
    )
