import numpy as np
import pytest
import torch

from seal_fast.train.data import load
from seal_fast.train.data.digits import read_digits


def test_stratified_and_disjoint():
    splits = load("DIGITS", None, role="student", time_steps=4)
    assert (len(splits.train), len(splits.val)) == (1437, 360)
    _, labels = read_digits()
    whole = np.bincount(labels)
    assert np.abs(np.bincount(splits.val.labels) - whole / 5).max() < 1
    assert np.array_equal(np.bincount(splits.train.labels) + np.bincount(splits.val.labels), whole)
    rows = [{image.numpy().tobytes() for image in part.images} for part in (splits.train, splits.val)]
    assert not rows[0] & rows[1]


def test_same_split_each_time_and_for_both_roles():
    np.random.seed(1)
    first = load("DIGITS", None, role="student", time_steps=4)
    np.random.seed(2)
    second = load("DIGITS", "/nowhere", role="teacher", time_steps=1)
    assert torch.equal(first.val.images, second.val.images)
    assert first.val.labels == second.val.labels


def test_normalised_with_the_training_part():
    splits = load("DIGITS", None, role="teacher", time_steps=4)
    normalise = splits.val.transform
    pixels = normalise(splits.train.images)
    # 3e-7 measured
    assert pixels.mean().item() == pytest.approx(0, abs=1e-5)
    assert pixels.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert splits.val[0][0].unique().numel() > 5


def test_a_crop_moves_by_one_pixel_at_most():
    train = load("DIGITS", None, role="student", time_steps=4).train
    black = train.transform.transforms[1](torch.zeros(1, 1, 1)).item()
    plain = torch.nn.functional.pad(load_plain(train), (1, 1, 1, 1), value=black)
    windows = [plain[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    torch.manual_seed(0)
    for _ in range(30):
        image, _ = train[0]
        assert any(torch.equal(image, window) for window in windows)


def load_plain(train):
    return train.transform.transforms[1](train.images[0])


def test_auto_aug_is_refused():
    with pytest.raises(ValueError, match="auto_aug"):
        load("DIGITS", None, role="student", time_steps=4, auto_aug=True)
