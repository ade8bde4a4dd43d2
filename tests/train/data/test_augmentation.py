import pytest
import torch
from torchvision.transforms import v2

import makers
from seal_fast.train.data import load, transforms
from seal_fast.train.data.camera import write_digits
from seal_fast.train.data.transforms import Cutout, Roll, event_transform, image_transforms

POLICY = {
    "CIFAR10": v2.AutoAugmentPolicy.CIFAR10,
    "CIFAR100": v2.AutoAugmentPolicy.CIFAR10,
    "imagenet": v2.AutoAugmentPolicy.IMAGENET,
}
HOLE = {"CIFAR10": 16, "CIFAR100": 16, "imagenet": 112}
IMAGES = pytest.mark.parametrize("name", POLICY)


def kinds(transform):
    return [type(step) for step in transform.transforms]


def choices(transform):
    return transform.transforms[-1].transforms


@pytest.mark.parametrize(("side", "size"), [(16, 32), (5, 9), (1, 4), (12, 8)])
def test_cutout_is_the_clipped_square(side, size, monkeypatch):
    """Every centre of the image, against the definition pixel by pixel."""
    pixel = torch.arange(size)
    for centre_y in range(size):
        for centre_x in (0, 1, size // 2, size - 1):
            draws = iter([centre_y, centre_x])
            monkeypatch.setattr(torch, "randint", lambda *_, draws=draws: torch.tensor(next(draws)))
            result = Cutout(side)(torch.ones(2, 3, size, size))
            rows = (pixel >= centre_y - side // 2) & (pixel < centre_y - side // 2 + side)
            columns = (pixel >= centre_x - side // 2) & (pixel < centre_x - side // 2 + side)
            assert torch.equal(result == 0, (rows[:, None] & columns).expand(2, 3, size, size))
            assert torch.equal(result == 1, ~(result == 0))


def test_cutout_centre_is_uniform_over_the_image():
    torch.manual_seed(0)
    holes = torch.stack([Cutout(16)(torch.ones(1, 32, 32))[0] == 0 for _ in range(4000)])
    areas = holes.sum((1, 2))
    assert areas.max() == 16 * 16
    assert areas.min() == 8 * 8  # centre in the top left corner
    # A pixel is covered where the centre is within the hole's reach of it: 8 × 8 centres of 32 × 32 for the bottom
    # right corner, 16 × 16 in the middle.
    frequency = holes.float().mean(0)
    assert frequency[16, 16] == pytest.approx(256 / 1024, abs=0.03)
    assert frequency[0, 0] == pytest.approx(81 / 1024, abs=0.02)
    assert frequency[31, 31] == pytest.approx(64 / 1024, abs=0.02)


def test_cutout_leaves_its_input_alone():
    image = torch.ones(3, 8, 8)
    Cutout(4)(image)
    assert image.all()


def test_roll_reaches_each_shift():
    torch.manual_seed(0)
    image = torch.arange(20 * 20.0).view(1, 20, 20)
    shifts = set()
    for _ in range(3000):
        place = (Roll(5)(image) == 0).nonzero()[0, 1:]
        shifts.add(tuple((((place + 10) % 20) - 10).tolist()))
    assert shifts == {(y, x) for y in range(-5, 6) for x in range(-5, 6)}


@IMAGES
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_published_image_recipe(name, role):
    train, val = image_transforms(name, role=role)
    crop = v2.RandomResizedCrop if name == "imagenet" else v2.RandomCrop
    last = [v2.PILToTensor, v2.ToDtype, v2.Normalize]
    extra = ([v2.AutoAugment], [Cutout]) if role == "student" else ([], [])
    assert kinds(train) == [crop, v2.RandomHorizontalFlip, *extra[0], *last, *extra[1]]
    assert kinds(val) == ([v2.Resize, v2.CenterCrop] if name == "imagenet" else []) + last
    if role == "student":
        assert train.transforms[2].policy == POLICY[name]
        assert train.transforms[-1].side == HOLE[name]
    if name == "imagenet":
        assert (train.transforms[0].size, val.transforms[0].size, val.transforms[1].size) == (
            (224, 224),
            [256],
            (224, 224),
        )
    else:
        assert (train.transforms[0].size, train.transforms[0].padding) == ((32, 32), [4, 4, 4, 4])


@IMAGES
@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("auto_aug", [True, False])
@pytest.mark.parametrize("cutout", [True, False])
def test_image_overrides(name, role, auto_aug, cutout):
    train, _ = image_transforms(name, role=role, auto_aug=auto_aug, cutout=cutout)
    assert (v2.AutoAugment in kinds(train)) == auto_aug
    assert (Cutout in kinds(train)) == cutout


def test_published_event_recipe():
    transform = event_transform(flip=True)
    assert kinds(transform) == [v2.RandomHorizontalFlip, v2.RandomChoice]
    assert transform.transforms[0].p == 0.5
    roll, rotation, cutout = choices(transform)
    assert (roll.reach, rotation.degrees, cutout.side) == (5, [-30.0, 30.0], 16)
    assert transform.transforms[1].p == pytest.approx([1 / 3] * 3)


def test_event_overrides():
    assert [type(choice) for choice in choices(event_transform(flip=True, cutout=False))] == [Roll, v2.RandomRotation]
    assert event_transform(flip=True, auto_aug=False) is None
    assert type(event_transform(flip=True, auto_aug=False, cutout=True)) is Cutout
    assert kinds(event_transform(flip=False)) == [v2.RandomChoice]


def test_all_time_steps_are_changed_alike():
    torch.manual_seed(1)
    frame = torch.rand(2, 48, 48)
    transform = event_transform(flip=True)
    results = [transform(frame.expand(4, 2, 48, 48)) for _ in range(60)]
    for result in results:
        assert torch.equal(result, result[:1].expand_as(result))
    assert len({result.sum().item() for result in results}) > 30


def test_exactly_one_of_the_three():
    """Each is picked in a third of the cases, and never two of them."""
    torch.manual_seed(2)
    calls = []
    transform = event_transform(flip=False)
    chooser = transform.transforms[0]
    chooser.transforms = [lambda frames, index=index: calls.append(index) or frames for index in range(3)]
    for _ in range(900):
        transform(torch.zeros(2, 2, 48, 48))
    assert len(calls) == 900
    assert all(calls.count(index) == pytest.approx(300, abs=60) for index in range(3))


def test_digits_recordings_are_not_mirrored(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "seal_fast.train.data.event_folder.event_transform", lambda *, flip, **_: seen.setdefault("flip", flip) and None
    )
    load("CIFAR10_DVS_SJ", makers.cifar10_dvs(tmp_path / "a"), role="student", time_steps=2)
    assert seen.pop("flip") is True
    write_digits(tmp_path / "b", per_class=1)
    load("DIGITS_DVS", tmp_path / "b", role="student", time_steps=2)
    assert seen.pop("flip") is False


@pytest.mark.parametrize("cutout", [None, True, False])
def test_digit_recipe(cutout):
    train, val = transforms.digit_transforms(5.0, 6.0, cutout=cutout)
    assert kinds(train) == [v2.RandomCrop, v2.Normalize, *([Cutout] if cutout else [])]
    assert train.transforms[0].padding == [1, 1, 1, 1]
    assert torch.equal(val(torch.full((1, 8, 8), 11.0)), torch.ones(1, 8, 8))
