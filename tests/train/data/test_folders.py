"""What is no data in a folder, and how what is there is told."""

import pytest

from seal_fast.train.data import DataError
from seal_fast.train.data.folders import check_root, hidden, names, not_found


@pytest.mark.parametrize(
    "name",
    [".DS_Store", "._0.JPEG", ".ipynb_checkpoints", "Thumbs.db", "thumbs.db", "desktop.ini", "__MACOSX", "@eaDir"],
)
def test_hidden(name):
    assert hidden(name)


@pytest.mark.parametrize("name", ["n01440764", "thumbs.db.JPEG", "_0.JPEG", "a.b", "MACOSX"])
def test_not_hidden(name):
    assert not hidden(name)


def test_names(tmp_path):
    for name in ("b", "a", ".c", "Thumbs.db"):
        (tmp_path / name).touch()
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "it is empty"), (5, "it holds x0, x1, x2, x3, x4"), (8, "it holds x0, x1, x2, x3, x4 and 3 more")],
)
def test_what_a_folder_holds(number, shown, tmp_path):
    for name in (*(f"x{index}" for index in range(number)), ".hidden"):
        (tmp_path / name).touch()
    assert not_found(tmp_path, "has no y", "get it").sentence == f"{tmp_path} has no y: {shown}; get it."


def test_the_folder_above_a_relative_one_is_asked_about(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path / "train")
    error = not_found(tmp_path.__class__("."), "has no train", "get it", lambda folder: (folder / "train").is_dir())
    assert error.sentence == ". has no train: it is empty; did you mean --data_path ..?"


def test_missing_root(tmp_path):
    with pytest.raises(DataError, match=r"absent is missing; get it\.$"):
        check_root(tmp_path / "absent", "get it")
