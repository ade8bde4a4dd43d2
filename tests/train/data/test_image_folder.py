import shutil

import pytest
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import makers
from seal_fast.train.data import DataError, load


def read(root):
    return load("imagenet", root, role="student", time_steps=4)


def sentence(root):
    with pytest.raises(DataError) as caught:
        read(root)
    assert "\n" not in caught.value.sentence
    assert "delete" not in caught.value.sentence
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
    other = {"train": "val", "val": "train"}[part]
    assert text.startswith(f"{tmp_path} has no folder {part}: it holds {other}; get ImageNet")
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
    assert text == (
        f"{root / 'val'} holds its files flat (n00000000_val_0.JPEG, n00000000_val_1.JPEG, n00000000_val_2.JPEG, "
        "n00000001_val_0.JPEG, n00000001_val_1.JPEG and 1 more), so their classes are unknown; move each image into "
        "val/<class>/, the class being the one that the development kit's ground truth names."
    )


def test_flat_train(tmp_path):
    """The ground truth of the development kit is that of val."""
    root = makers.image_folder(tmp_path)
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    (root / "train/0.JPEG").touch()
    assert sentence(root) == (
        f"{root}/train holds its files flat (0.JPEG), so their classes are unknown; move each image into "
        "train/<class>/."
    )


def test_train_as_its_tar_unpacks(tmp_path):
    root = makers.image_folder(tmp_path)
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    for number in range(7):
        (root / f"train/n0{number}.tar").touch()
    assert sentence(root) == (
        f"{root}/train holds the classes packed (n00.tar, n01.tar, n02.tar, n03.tar, n04.tar and 2 more); unpack each "
        "into a folder of its name, as in: mkdir n00 && tar -xf n00.tar -C n00."
    )


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
    assert "without an image (n00000001); fill them with images, whose names end in .jpg, .jpeg" in sentence(root)


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
    text = caught.value.sentence
    if fault == "missing":
        assert text == f"{path} cannot be read: no such file or directory."
    else:
        assert text.startswith(f"{path} cannot be read as an image (")
    assert "\n" not in text
    assert "delete" not in text
    assert ("unpack it again" in text) == (fault in ("truncated", "empty"))


def test_order_is_torchvisions(tmp_path):
    """Folders in class folders, links among them, and names around the separator."""
    root = makers.image_folder(tmp_path / "data")
    for part in ("train", "val"):
        folder = root / part / "n00000000"
        for inner in ("b/c", "b-d", "a"):
            (folder / inner).mkdir(parents=True)
            shutil.copy(folder / f"{part}_0.JPEG", folder / inner / "x.PNG")
        (folder / "b/c/link").symlink_to(tmp_path / "linked", target_is_directory=True)
    (tmp_path / "linked").mkdir()
    shutil.copy(root / "val/n00000001/val_1.JPEG", tmp_path / "linked/y.jpg")
    splits = read(root)
    for part, samples in (("train", splits.train), ("val", splits.val)):
        expected = ImageFolder(root / part)
        assert samples.samples == expected.samples
        assert samples.classes == expected.classes
    assert len(splits.train) == 3 + 4 + 3


HIDDEN = ["._0.JPEG", ".ipynb_checkpoints/a.JPEG", "Thumbs.db", "desktop.ini", "__MACOSX/a.JPEG", "@eaDir/a.JPEG"]


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("where", ["", "train", "train/n00000000"])
def test_hidden_entries_are_no_samples_and_no_classes(where, name, tmp_path):
    root = makers.image_folder(tmp_path)
    before = read(root)
    path = root / where / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(root / "train/n00000000/train_0.JPEG", path)
    after = read(root)
    assert after.classes == before.classes
    assert after.train.samples == before.train.samples


@pytest.mark.parametrize("name", HIDDEN)
def test_a_class_of_hidden_entries_is_empty(name, tmp_path):
    root = makers.image_folder(tmp_path)
    for path in (root / "val/n00000000").iterdir():
        path.unlink()
    path = root / "val/n00000000" / name
    path.parent.mkdir(exist_ok=True)
    shutil.copy(root / "train/n00000000/train_0.JPEG", path)
    assert "without an image (n00000000)" in sentence(root)


@pytest.mark.parametrize("name", HIDDEN)
def test_a_part_of_hidden_entries_is_empty(name, tmp_path):
    root = makers.image_folder(tmp_path)
    image = (root / "train/n00000000/train_0.JPEG").read_bytes()
    shutil.rmtree(root / "val")
    path = root / "val" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(image)
    assert f"{root / 'val'} is empty" in sentence(root)


def test_a_link_that_leads_round_in_a_circle(tmp_path):
    """Torchvision takes each image of such a class forty times."""
    root = makers.image_folder(tmp_path)
    (root / "train/n00000001/again").symlink_to(root / "train/n00000001", target_is_directory=True)
    assert "cannot be read: " in sentence(root)


def test_root_is_one_level_too_high_or_too_low(tmp_path):
    root = makers.image_folder(tmp_path / "data/imagenet")
    assert sentence(root.parent) == (
        f"{root.parent} has no folder train: it holds imagenet; did you mean --data_path {root}?"
    )
    assert sentence(root / "train") == (
        f"{root / 'train'} has no folder train: it holds n00000000, n00000001; did you mean --data_path {root}?"
    )


def test_class_folders_alone_are_named(tmp_path):
    for number in range(7):
        (tmp_path / f"n{number}").mkdir()
    (tmp_path / ".cache").mkdir()
    text = sentence(tmp_path)
    assert text.startswith(f"{tmp_path} has no folder train: it holds n0, n1, n2, n3, n4 and 2 more; get ImageNet")
