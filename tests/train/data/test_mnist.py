import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

import makers
from seal_fast.train.data import DataError, load

RAW = Path("MNIST/raw")
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
FOLDERS = pytest.mark.parametrize("folder", ["MNIST/raw", "raw", "."])


def read(root):
    return load("MNIST", root, role="teacher", time_steps=4)


def sentence(root):
    with pytest.raises(DataError) as caught:
        read(root)
    text = caught.value.sentence
    assert "\n" not in text
    # What is no proof of damage is no reason to delete, nor to have torchvision write over what is there.
    broken = any(words in text for words in ("is truncated", "is too long"))
    assert ("delete" in text) == broken
    how_to_get = f'torchvision.datasets.MNIST("{root}", download=True)'
    assert (how_to_get in text) == (broken or any(words in text for words in ("is missing", "has no train-images")))
    return text


def same(one, other):
    return all(
        np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
        for a, b in ((one.train, other.train), (one.val, other.val))
    )


def test_equals_torchvision(tmp_path):
    """The same images, labels and number of each as torchvision's own reader."""
    splits = read(makers.mnist(tmp_path))
    for part, train, number in ((splits.train, True, 40), (splits.val, False, 10)):
        expected = datasets.MNIST(str(tmp_path), train=train)
        assert np.array_equal(part.images, expected.data.numpy())
        assert part.images.dtype == np.uint8
        assert part.labels.tolist() == expected.targets.tolist()
        assert len(part) == len(expected) == number
    assert splits.classes == tuple("0123456789")


@pytest.mark.parametrize("compressed", [False, True])
@FOLDERS
def test_layouts(folder, compressed, tmp_path):
    torchvision = read(makers.mnist(tmp_path / "a"))
    other = read(makers.mnist(tmp_path / "b", folder=folder, compressed=compressed))
    assert same(torchvision, other)


def test_plain_files_are_preferred(tmp_path):
    makers.mnist(tmp_path, seed=1, compressed=True)
    compressed = read(tmp_path)
    makers.mnist(tmp_path)
    assert same(read(tmp_path), read(makers.mnist(tmp_path / "plain")))
    assert not same(read(tmp_path), compressed)


def test_plain_and_compressed_files_mix(tmp_path):
    makers.mnist(tmp_path, compressed=True)
    before = read(tmp_path)
    path = tmp_path / RAW / f"{IMAGES}.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    assert same(read(tmp_path), before)


def test_a_whole_folder_goes_before_a_part(tmp_path):
    makers.mnist(tmp_path, seed=1)
    (tmp_path / RAW / LABELS).unlink()
    makers.mnist(tmp_path, folder=".")
    assert same(read(tmp_path), read(makers.mnist(tmp_path / "whole")))


def test_items_are_the_pixels(tmp_path):
    """Neither role's images are cropped or mirrored, unless that is asked for."""
    makers.mnist(tmp_path)
    for role in ("teacher", "student"):
        splits = load("MNIST", tmp_path, role=role, time_steps=4)
        for part in (splits.train, splits.val):
            for index in range(len(part)):
                image, label = part[index]
                assert np.array_equal(image.numpy(), part.images[index][None])
                assert label == part.labels[index]


def test_normalised(tmp_path):
    splits = load("MNIST", makers.mnist(tmp_path), role="student", time_steps=4)
    for part, finish in ((splits.train, splits.finish_train), (splits.val, splits.finish_val)):
        expected = (torch.tensor(part.images[3][None]) / 255 - torch.tensor(0.1307)) / torch.tensor(0.3081)
        torch.testing.assert_close(finish(part[3][0][None])[0], expected, rtol=0, atol=0)


def test_no_files(tmp_path):
    assert f"{tmp_path} has no {FILES[0]}, plain or as .gz" in sentence(tmp_path)


def test_root_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert sentence(path) == f"{path} is no folder; name the folder that holds the data."


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", FILES)
@FOLDERS
def test_missing_file(folder, name, compressed, tmp_path):
    makers.mnist(tmp_path, folder=folder, compressed=compressed)
    path = tmp_path / folder / name
    path.with_name(f"{name}{'.gz' if compressed else ''}").unlink()
    assert f"{path} is missing, and so is {name}.gz" in sentence(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 4, 7, 15, 16, 1000, -1])
def test_truncated_images(keep, tmp_path):
    path = makers.mnist(tmp_path) / RAW / IMAGES
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is truncated" in sentence(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 4, 7, 8, 20, -1])
def test_truncated_labels(keep, tmp_path):
    path = makers.mnist(tmp_path) / RAW / LABELS
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is truncated" in sentence(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_too_long(name, tmp_path):
    path = makers.mnist(tmp_path) / RAW / name
    length = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    text = sentence(tmp_path)
    assert f"{path} is too long: it has {length + 1} bytes instead of the {length}" in text


def test_sizes_of_the_whole_of_uint32(tmp_path):
    """Their product exceeds 64 bits, so it must not wrap."""
    path = makers.mnist(tmp_path) / RAW / IMAGES
    path.write_bytes(bytes((0, 0, 8, 3)) + b"\xff" * 12)
    assert f"{path} is truncated: it has 16 bytes instead of the {16 + (2**32 - 1) ** 3}" in sentence(tmp_path)


@pytest.mark.parametrize(
    "start",
    [b"\0\0\x08\x01", b"\0\0\x0d\x03", b"\x03\x08\0\0", b"\x1f\x8b\x08\x00", b"<htm", b"\x01"],
    ids=["labels", "float32", "little-endian", "gzip", "html", "short"],
)
def test_wrong_magic(start, tmp_path):
    path = makers.mnist(tmp_path) / RAW / IMAGES
    content = path.read_bytes()
    path.write_bytes(start + (content[4:] if len(start) == 4 else b""))
    assert f"{path} is no IDX file of images: it begins with {start.hex()} instead of 00000803" in sentence(tmp_path)


@pytest.mark.parametrize("keep", [1, 5, 0.5, 0.999])
def test_truncated_gzip(keep, tmp_path):
    path = makers.mnist(tmp_path, compressed=True) / RAW / f"{IMAGES}.gz"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert f"{path} is truncated or corrupt" in sentence(tmp_path)


def test_something_else_named_gz(tmp_path):
    path = makers.mnist(tmp_path, compressed=True) / RAW / f"{IMAGES}.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert sentence(tmp_path) == f"{path} is no gzip file: it begins with 0000 instead of 1f8b."


@pytest.mark.parametrize("place", [2, 200, -8], ids=["method", "data", "checksum"])
def test_corrupt_gzip(place, tmp_path):
    path = makers.mnist(tmp_path, compressed=True) / RAW / f"{IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    assert f"{path} is truncated or corrupt" in sentence(tmp_path)


def test_empty_gzip(tmp_path):
    path = makers.mnist(tmp_path, compressed=True) / RAW / f"{LABELS}.gz"
    path.write_bytes(b"")
    assert f"{path} is truncated" in sentence(tmp_path)


@pytest.mark.parametrize("shape", [(40, 32, 32), (40, 28, 27), (40, 784, 1), (40, 0, 0)])
def test_other_sizes_of_image(shape, tmp_path):
    path = makers.mnist(tmp_path) / RAW / IMAGES
    path.write_bytes(makers.idx(np.zeros(shape, np.uint8)))
    assert f"{path} holds images of {shape[1]}x{shape[2]} pixels instead of 28x28" in sentence(tmp_path)


@pytest.mark.parametrize(("images", "labels"), [(40, 39), (39, 40), (0, 40), (40, 0), (0, 0)])
def test_other_number_of_labels(images, labels, tmp_path):
    folder = makers.mnist(tmp_path) / RAW
    (folder / IMAGES).write_bytes(makers.idx(np.zeros((images, 28, 28), np.uint8)))
    (folder / LABELS).write_bytes(makers.idx(np.zeros(labels, np.uint8)))
    assert f"{folder / IMAGES} holds {images} images and {LABELS} {labels} labels" in sentence(tmp_path)


@pytest.mark.parametrize("wrong", [10, 255])
def test_label_out_of_range(wrong, tmp_path):
    path = makers.mnist(tmp_path) / RAW / LABELS
    content = bytearray(path.read_bytes())
    content[-1] = wrong
    path.write_bytes(content)
    assert f"{path} holds the label {wrong}, outside 0 to 9" in sentence(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and whose reading fails")
@pytest.mark.parametrize("compressed", [False, True])
def test_unreadable_file(compressed, tmp_path):
    """Root, as whom the tests may run, can open every file, but no process has memory at address 0."""
    path = makers.mnist(tmp_path, compressed=compressed) / RAW / f"{IMAGES}{'.gz' if compressed else ''}"
    path.unlink()
    path.symlink_to("/proc/self/mem")
    assert f"{path} cannot be read: input/output error." == sentence(tmp_path)


def test_unreadable_root(tmp_path):
    root = tmp_path / ("x" * 300)
    assert sentence(root) == f"{root} cannot be read: file name too long."


@pytest.mark.parametrize("folder", ["MNIST", "MNIST/raw"])
def test_root_is_a_folder_of_torchvisions_layout(folder, tmp_path):
    makers.mnist(tmp_path)
    assert same(read(tmp_path), read(tmp_path / folder))
    (tmp_path / RAW / LABELS).unlink()
    with pytest.raises(DataError) as caught:
        read(tmp_path / folder)
    assert f'torchvision.datasets.MNIST("{tmp_path}", download=True)' in caught.value.sentence


def test_root_is_one_level_too_high(tmp_path):
    makers.mnist(tmp_path / "digits", compressed=True)
    with pytest.raises(DataError) as caught:
        read(tmp_path)
    assert caught.value.sentence.endswith(f": it holds digits; did you mean --data_path {tmp_path / 'digits'}?")


def test_what_lies_there_instead_is_named(tmp_path):
    for name in ("mnist.npz", "notes.txt", ".DS_Store"):
        (tmp_path / name).touch()
    assert ": it holds mnist.npz, notes.txt; get it with" in sentence(tmp_path)
