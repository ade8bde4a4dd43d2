import pytest
import torch
from torch.utils.data import DataLoader

import makers
from seal_fast.train.data import DATASETS, DataError, canonical, load

SHAPES = {  # C, size, number of classes
    "CIFAR10": (3, 32, 10),
    "CIFAR100": (3, 32, 100),
    "CIFAR10_DVS_SJ": (2, 48, 10),
    "imagenet": (3, 224, 2),
    "MNIST": (1, 28, 10),
    "DIGITS": (1, 8, 10),
    "DIGITS_DVS": (2, 48, 10),
}


class Failing(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise DataError("The file a: b is cut; replace DataError: with care.")


def test_names():
    assert DATASETS == ("CIFAR10", "CIFAR100", "CIFAR10_DVS_SJ", "imagenet", "MNIST", "DIGITS", "DIGITS_DVS")


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("name", DATASETS)
def test_items(name, role, tmp_path):
    makers.SETS[name](tmp_path)
    splits = load(name, tmp_path, role=role, time_steps=3)
    channels, size, num_classes = SHAPES[name]
    assert (splits.name, splits.in_channels, splits.image_size) == (name, channels, size)
    assert splits.num_classes == len(splits.classes) == num_classes
    assert splits.events == ("DVS" in name)
    shape = (3, channels, size, size) if splits.events else (channels, size, size)
    for part, finish in ((splits.train, splits.finish_train), (splits.val, splits.finish_val)):
        assert len(part) > 0
        for image, label in (part[0], part[len(part) - 1]):
            assert type(image) is torch.Tensor
            assert image.dtype == (torch.float32 if finish is None else torch.uint8)
            assert image.shape == shape
            finished = image[None] if finish is None else finish(image[None])
            assert finished.dtype == torch.float32
            assert finished.shape == (1, *shape)
            assert finished.isfinite().all()
            assert type(label) is int
            assert 0 <= label < num_classes
    assert torch.equal(splits.val[0][0], splits.val[0][0])


@pytest.mark.parametrize("name", DATASETS)
def test_augmentation_follows_torch_seed_alone(name, tmp_path):
    makers.SETS[name](tmp_path)
    # MNIST's images are left as they are unless AutoAugment is asked for.
    train = load(name, tmp_path, role="student", time_steps=3, auto_aug=True if name == "MNIST" else None).train
    torch.manual_seed(5)
    first = [train[0][0] for _ in range(6)]
    torch.manual_seed(5)
    second = [train[0][0] for _ in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(first[0], other) for other in first[1:])


def test_other_name(tmp_path):
    root = makers.cifar10_dvs(tmp_path)
    splits = load("CIFAR10_DVS", root, role="student", time_steps=3)
    assert splits.name == canonical("CIFAR10_DVS") == "CIFAR10_DVS_SJ"
    assert splits.events
    frames = list(root.rglob("frames.npy"))
    assert torch.equal(splits.val[0][0], load("CIFAR10_DVS_SJ", root, role="student", time_steps=3).val[0][0])
    assert list(root.rglob("frames.npy")) == frames != []


@pytest.mark.parametrize("name", DATASETS)
def test_names_without_another(name):
    assert canonical(name) is name


@pytest.mark.parametrize("name", ["xyzzy", "cifar10_dvs", None, ["CIFAR10"]])
def test_names_of_nothing(name):
    with pytest.raises(ValueError, match=r"^must be one of .*; got "):
        canonical(name)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("cifar10", "CIFAR10"),
        ("CIFAR-10", "CIFAR10"),
        ("cifar-100", "CIFAR100"),
        ("ImageNet", "imagenet"),
        ("CIFAR10-DVS", "CIFAR10_DVS"),
        ("mnist", "MNIST"),
    ],
)
def test_unknown_name_says_the_closest(given, meant):
    with pytest.raises(ValueError, match=rf"did you mean {meant}\?$"):
        load(given, None, role="student", time_steps=4)
    with pytest.raises(ValueError, match=rf"; got '{given}'; did you mean {meant}\?$"):
        canonical(given)


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"one of CIFAR10, CIFAR100, .*DIGITS_DVS; got 'xyzzy'$"):
        load("xyzzy", None, role="student", time_steps=4)


def test_unknown_role():
    with pytest.raises(ValueError, match="role"):
        load("DIGITS", None, role="pupil", time_steps=4)


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "DIGITS"])
def test_root_is_needed(name):
    with pytest.raises(DataError, match="--data_path"):
        load(name, None, role="student", time_steps=4)


@pytest.mark.parametrize("name", [name for name in DATASETS if "DIGITS" not in name])
def test_missing_root_is_named_and_not_made(name, tmp_path):
    root = tmp_path / "absent"
    with pytest.raises(DataError, match=f"{root}.* (get|put) ") as caught:
        load(name, root, role="student", time_steps=4)
    assert caught.value.sentence.count("\n") == 0
    assert not root.exists()


@pytest.mark.parametrize("time_steps", [0, -1, 2.5])
def test_time_steps_of_event_data(time_steps, tmp_path):
    with pytest.raises(ValueError, match="time_steps"):
        load("CIFAR10_DVS_SJ", makers.cifar10_dvs(tmp_path), role="student", time_steps=time_steps)


@pytest.mark.parametrize("workers", [0, 1])
def test_sentence_out_of_a_loader(workers):
    with pytest.raises(DataError) as caught:
        next(iter(DataLoader(Failing(), num_workers=workers)))
    assert ("Traceback" in str(caught.value)) == bool(workers)
    assert caught.value.sentence == "The file a: b is cut; replace DataError: with care."
