"""Layouts of event recordings that are nearly right are told as what they are."""

import shutil

import pytest

import makers
from seal_fast.train.data import DataError, load

GET = (
    "put the ten zip files of CIFAR10-DVS (figshare.com, article 4724671; SpikingJelly's page on CIFAR10DVS links to "
    "them) into"
)


def sentence(root):
    with pytest.raises(DataError) as caught:
        load("CIFAR10_DVS_SJ", root, role="student", time_steps=2)
    assert "\n" not in caught.value.sentence
    return caught.value.sentence


def read(root):
    splits = load("CIFAR10_DVS_SJ", root, role="student", time_steps=2)
    return len(splits.train) + len(splits.val)


@pytest.mark.parametrize("layout", ["extract", "events_np", "download"])
def test_a_folder_between(layout, tmp_path):
    """Both of what is advised is read."""
    root = makers.cifar10_dvs(tmp_path, layout=layout)
    (root / layout).rename(root / "x")
    (root / layout).mkdir()
    (root / "x").rename(root / layout / "CIFAR10-DVS")
    inner = root / layout / "CIFAR10-DVS"
    assert sentence(root) == (
        f"{root}/{layout} has no recordings of any class: it holds CIFAR10-DVS; did you mean --data_path {inner}, or "
        "move CIFAR10-DVS/* up?"
    )
    assert read(inner) == 20
    for path in inner.iterdir():
        path.rename(root / layout / path.name)
    assert read(root) == 20


@pytest.mark.parametrize(
    ("layout", "name", "wrong"),
    [
        ("extract", "truck", "Truck"),
        ("events_np", "truck", "TRUCK"),
        ("flat", "truck", "Truck"),
        ("download", "dog.zip", "Dog.zip"),
        ("download", "dog.zip", "dog.ZIP"),
    ],
)
def test_one_name_in_another_case(layout, name, wrong, tmp_path):
    root = makers.cifar10_dvs(tmp_path, layout=layout)
    place = root if layout == "flat" else root / layout
    (place / name).rename(place / wrong)
    class_name = name.removesuffix(".zip")
    text = (
        f"{place} has no recordings of {class_name}: it holds {wrong} instead of {name}; rename it and others like it."
    )
    assert sentence(root) == text
    (place / wrong).rename(place / name)
    assert read(root) == 20


def test_all_names_in_another_case(tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    for path in list((root / "extract").iterdir()):
        path.rename(path.with_name(path.name.title()))
    assert sentence(root) == (
        f"{root}/extract has no recordings of any class: it holds Airplane instead of airplane; rename it and others "
        "like it."
    )


@pytest.mark.parametrize(("layout", "suffix"), [("extract", ".AEDAT"), ("events_np", ".Npz")])
def test_suffixes_in_another_case(layout, suffix, tmp_path):
    root = makers.cifar10_dvs(tmp_path, layout=layout)
    for path in list((root / layout).glob("*/*")):
        path.rename(path.with_suffix(suffix))
    name = "cifar10_airplane_0"
    assert sentence(root) == (
        f"{root}/{layout} has no recordings of any class: it holds airplane/{name}{suffix} instead of "
        f"airplane/{name}{suffix.lower()}; rename it and others like it."
    )


@pytest.mark.parametrize("layout", ["extract", "events_np", "download"])
def test_an_empty_place(layout, tmp_path):
    (tmp_path / layout).mkdir()
    text = f"{tmp_path}/{layout} has no recordings of any class: it is empty; {GET} {tmp_path}/download."
    assert sentence(tmp_path) == text


def test_a_place_that_holds_something_is_named_before_an_empty_one(tmp_path):
    (tmp_path / "extract").mkdir()
    (tmp_path / "download").mkdir()
    (tmp_path / "download/all.zip").touch()
    text = f"{tmp_path}/download has no recordings of any class: it holds all.zip; {GET} {tmp_path}/download."
    assert sentence(tmp_path) == text


def test_a_class_folder_without_recordings(tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    shutil.rmtree(root / "extract/frog")
    (root / "extract/frog").mkdir()
    (root / "extract/frog/frog.mat").touch()
    assert sentence(root) == (f"{root}/extract/frog has no recordings: it holds frog.mat; {GET} {root}/download.")


def test_another_folder_beside_an_empty_place(tmp_path):
    root = makers.cifar10_dvs(tmp_path / "dvs")
    (tmp_path / "extract").mkdir()
    assert sentence(tmp_path) == (
        f"{tmp_path} has no recordings of any class: it holds dvs, extract; did you mean --data_path {root}?"
    )
