import shutil

import pytest
from torch.utils.data import DataLoader

import makers
from seal_fast.train.data import DataError, load


def read(root):
    return load("imagenet", root, role="student", time_steps=4)


def sentence(root):
    with pytest.raises(DataError) as caught:
        read(root)
    assert "\n" not in caught.value.sentence
    return caught.value.sentence


def test_classes_are_the_folders(tmp_path):
    splits = read(makers.image_folder(tmp_path, classes=3, per_class=2))
    assert splits.classes == ("n00000000", "n00000001", "n00000002")
    assert [label for _, label in splits.val.samples] == [0, 0, 1, 1, 2, 2]
    assert len(splits.train) == 6


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_part(part, tmp_path):
    shutil.rmtree(makers.image_folder(tmp_path) / part)
    text = sentence(tmp_path)
    assert f"{tmp_path / part} is missing" in text
    assert "image-net.org" in text


@pytest.mark.parametrize("part", ["train", "val"])
def test_empty_part(part, tmp_path):
    shutil.rmtree(makers.image_folder(tmp_path) / part)
    (tmp_path / part).mkdir()
    assert f"{tmp_path / part} is empty" in sentence(tmp_path)


def test_flat_val(tmp_path):
    root = makers.image_folder(tmp_path)
    for path in (root / "val").glob("*/*.JPEG"):
        path.rename(root / "val" / f"{path.parent.name}_{path.name}")
    for folder in [child for child in (root / "val").iterdir() if child.is_dir()]:
        folder.rmdir()
    text = sentence(root)
    assert f"{root / 'val'} holds its files flat" in text
    assert "val/<class>/" in text


def test_different_classes(tmp_path):
    root = makers.image_folder(tmp_path)
    (root / "val" / "n00000001").rename(root / "val" / "n00000007")
    assert "train has n00000001 and val has not" in sentence(root)


def test_one_class_more_in_val(tmp_path):
    root = makers.image_folder(tmp_path)
    shutil.copytree(root / "val" / "n00000001", root / "val" / "n00000000a")
    assert "val has n00000000a and train has not" in sentence(root)


def test_empty_class(tmp_path):
    root = makers.image_folder(tmp_path)
    for path in (root / "train" / "n00000001").iterdir():
        path.rename(path.with_suffix(".txt"))
    assert "without an image (n00000001)" in sentence(root)


@pytest.mark.parametrize(
    ("fault", "workers"), [("truncated", 0), ("empty", 0), ("text", 0), ("missing", 0), ("truncated", 1)]
)
def test_unreadable_image(fault, workers, tmp_path):
    root = makers.image_folder(tmp_path, classes=1, per_class=1)
    splits = read(root)
    path = next((root / "val").glob("*/*"))
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image\n"}[fault])
    with pytest.raises(DataError) as caught:
        next(iter(DataLoader(splits.val, num_workers=workers)))
    assert caught.value.sentence.startswith(f"{path} cannot be read as an image")
    assert "\n" not in caught.value.sentence
