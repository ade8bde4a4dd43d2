import shutil

import numpy as np
import pytest
import torch

from seal_fast.train.data import DataError, camera, event_folder, load
from seal_fast.train.data.aedat import read_aedat
from seal_fast.train.data.digits import read_digits


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    camera.write_digits(folder, per_class=2)
    return folder


@pytest.fixture(scope="module")
def recordings(root):
    return {path.stem: read_aedat(path) for path in root.glob("extract/*/*.aedat")}


def test_number_of_events(recordings):
    counts = [len(events.t) for events in recordings.values()]
    assert len(counts) == 20
    assert min(counts) > 2_000
    assert max(counts) < 12_000
    assert 4_000 < np.mean(counts) < 8_000


def test_both_polarities_and_time_in_order(recordings):
    for events in recordings.values():
        assert (np.diff(events.t) >= 0).all()
        assert 0 <= events.t[0] < events.t[-1] <= 2 * 16 * 12_500
        assert 0.3 < events.p.mean() < 0.7


def test_decodes_with_spikingjelly(root, recordings, spikingjelly_aedat):
    path = root / "extract" / "3" / "digit_3_1.aedat"
    other = spikingjelly_aedat(path)
    for name, array in recordings["digit_3_1"]._asdict().items():
        assert np.array_equal(array, other[name])


def test_deterministic(root, tmp_path):
    camera.write_digits(tmp_path, per_class=1)
    for path in tmp_path.glob("extract/*/*.aedat"):
        assert path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes()


def test_path_is_closed_and_of_constant_speed():
    path = camera.rhombus()
    assert np.allclose(path[0], path[-1])
    assert np.allclose(path[0], path[16])
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert np.allclose(steps, steps[0])
    assert np.allclose(path.mean(0), path[0] / len(path))
    assert np.allclose(np.abs(path).sum(1), 4)


def test_events_follow_log_intensity():
    """Summed over a pixel, events times threshold are its change of log intensity, to within one threshold."""
    image = read_digits()[0][5]
    events = camera.film(image)
    half = events.t < 8 * 12_500  # from the right corner to the left one, the first loop's half
    change = np.zeros((128, 128))
    np.add.at(change, (events.y[half], events.x[half]), (2 * events.p[half] - 1) * camera._THRESHOLD)

    def log_intensity(shift):
        padded = np.zeros((128, 128))
        source = torch.nn.functional.interpolate(
            torch.nn.functional.pad(torch.from_numpy(image)[None, None], (1, 1, 1, 1)), scale_factor=10, mode="bilinear"
        )[0, 0].numpy()
        left = 14 + shift
        padded[14:114, left : left + 100] = source
        return np.log1p(padded / 4)

    expected = log_intensity(-4) - log_intensity(4)
    assert np.abs(expected).max() > 2 * camera._THRESHOLD
    assert np.abs(change - expected).max() < camera._THRESHOLD + 1e-6


def test_upright_where_the_digit_is():
    """Ink in the top left corner of the image gives events in the top left of the sensor."""
    image = np.zeros((8, 8), np.float32)
    image[1:3, 1:4] = 16
    events = camera.film(image)
    assert events.y.max() < 64
    assert events.x.max() < 84
    assert abs(events.x.mean() - (24 + 2.5 * 10)) < 3
    assert abs(events.y.mean() - (24 + 2.0 * 10)) < 3


def test_few_recordings_are_used_as_they_are(root):
    before = sorted(root.glob("extract/*/*"))
    splits = load("DIGITS_DVS", root, role="student", time_steps=4)
    assert (len(splits.train), len(splits.val)) == (18, 2)
    assert sorted(root.glob("extract/*/*")) == before


def test_made_when_the_folder_is_missing(tmp_path, monkeypatch):
    write = camera.write_digits
    monkeypatch.setattr(event_folder, "write_digits", lambda root: write(root, per_class=1))
    splits = load("DIGITS_DVS", tmp_path / "new" / "folder", role="teacher", time_steps=4)
    assert (len(splits.train), len(splits.val)) == (9, 1)


def test_foreign_files_are_left_alone(tmp_path, monkeypatch):
    write = camera.write_digits
    monkeypatch.setattr(event_folder, "write_digits", lambda root: write(root, per_class=1))
    (tmp_path / "extract" / "cat").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    load("DIGITS_DVS", tmp_path, role="teacher", time_steps=4)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "extract" / "cat").is_dir()


@pytest.mark.parametrize("name", [".DS_Store", None])
def test_a_class_folder_without_recordings_is_filled(name, tmp_path):
    path = tmp_path / "extract" / "4"
    path.mkdir(parents=True)
    if name is not None:
        (path / name).write_text("mine")
    camera.write_digits(tmp_path, per_class=1)
    assert len(list(tmp_path.glob("extract/*/*.aedat"))) == 10
    assert name is None or (path / name).read_text() == "mine"
    assert not list(tmp_path.rglob(".building-*"))


def test_a_class_folder_of_something_else(tmp_path, monkeypatch):
    write = camera.write_digits
    monkeypatch.setattr(event_folder, "write_digits", lambda root: write(root, per_class=1))
    path = tmp_path / "extract" / "4" / "notes.txt"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(DataError) as caught:
        load("DIGITS_DVS", tmp_path, role="teacher", time_steps=4)
    assert caught.value.sentence == (
        f"{tmp_path}/extract/4 has no recordings: it holds notes.txt; move that elsewhere, and they will be made."
    )
    assert path.read_text() == "mine"
    path.rename(tmp_path / path.name)
    assert len(load("DIGITS_DVS", tmp_path, role="teacher", time_steps=4).train) == 9


def test_lost_class_is_filmed_again(tmp_path):
    camera.write_digits(tmp_path, per_class=1)
    shutil.rmtree(tmp_path / "extract" / "4")
    camera.write_digits(tmp_path, per_class=1)
    assert len(list(tmp_path.glob("extract/*/*"))) == 10


@pytest.mark.long
def test_whole_set(tmp_path):
    splits = load("DIGITS_DVS", tmp_path, role="student", time_steps=10)
    assert (len(splits.train), len(splits.val)) == (1618, 179)
    assert sum(path.stat().st_size for path in tmp_path.glob("extract/*/*")) < 150e6
