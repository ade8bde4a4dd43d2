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
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IMAGES = pytest.mark.parametrize("name", POLICY)


def kinds(transform):
    return [type(step) for step in transform.transforms]


def choices(transform):
    return transform.transforms[-1].transforms


@pytest.mark.parametrize(("side", "size"), [(16, 32), (5, 9), (1, 4), (12, 8)])
def test_cutout_is_the_clipped_square(side, size):
    """Every centre of the image, against the definition pixel by pixel."""
    pixel = torch.arange(size)
    for centre_y in range(size):
        for centre_x in (0, 1, size // 2, size - 1):
            draws = torch.tensor([[centre_y, centre_x + size]])
            (result,) = Cutout(side).of_each(torch.ones(1, 2, 3, size, size), draws)
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
    recipe = image_transforms(name, role=role)
    train, val = recipe.train, recipe.val
    crop = v2.RandomResizedCrop if name == "imagenet" else v2.RandomCrop
    extra = [v2.AutoAugment] if role == "student" else []
    assert kinds(train) == [crop, v2.RandomHorizontalFlip, *extra, v2.PILToTensor]
    assert kinds(val) == ([v2.Resize, v2.CenterCrop] if name == "imagenet" else []) + [v2.PILToTensor]
    assert recipe.finish_val.cutout is None
    if role == "student":
        assert train.transforms[2].policy == POLICY[name]
        assert recipe.finish_train.cutout.side == HOLE[name]
    else:
        assert recipe.finish_train.cutout is None
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
    recipe = image_transforms(name, role=role, auto_aug=auto_aug, cutout=cutout)
    assert (v2.AutoAugment in kinds(recipe.train)) == auto_aug
    assert (recipe.finish_train.cutout is not None) == cutout


@IMAGES
def test_batches_are_normalised_as_torchvision_does(name):
    images = torch.randint(256, (3, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    finish = image_transforms(name, role="teacher").finish_train
    mean, std = finish.mean.flatten().tolist(), finish.std.flatten().tolist()
    expected = v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), mean, std)
    # The division by 255 and the product with 1/255 differ in the last bit; measured 5e-7.
    torch.testing.assert_close(finish(images), expected, rtol=0, atol=1e-6)
    assert finish(images).dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_each_image_of_a_batch_has_its_own_hole(device):
    torch.manual_seed(0)
    images = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8, device=device)
    finish = image_transforms("CIFAR10", role="student").finish_train
    holes = finish(images) == 0
    assert (holes == holes[:, :1]).all()  # in all channels alike
    areas = holes[:, 0].sum((1, 2))
    assert areas.min() >= 8 * 8
    assert areas.max() == 16 * 16
    assert len({tuple(hole.nonzero()[0].tolist()) for hole in holes[:, 0]}) > 32
    torch.manual_seed(0)
    assert torch.equal(finish(images) == 0, holes)


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
