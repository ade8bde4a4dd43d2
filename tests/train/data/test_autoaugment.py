"""AutoAugment against the published one: operations pixel by pixel, policies entry by entry, draws by their shares."""

import json
import math
import pickle
import random
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from golden import DATA, arrays
from seal_fast.train.data.autoaugment import OPERATIONS, POLICIES, AutoAugment

PUBLISHED = json.loads((DATA / "augment.json").read_text(encoding="utf-8"))
SIGNED = {"shearX", "shearY", "translateX", "translateY", "color", "contrast", "sharpness", "brightness"}


def expected_shares(policy):
    """What choose() may return → its probability, by the published table.

    A pair is drawn uniformly, each of its operations is applied with its probability, and each sign is a fair coin; all
    of them independently.
    """
    shares = Counter()
    for *first, other_probability, other, other_index in PUBLISHED[policy]:
        parts = []
        for probability, name, index in (first, (other_probability, other, other_index)):
            magnitude = OPERATIONS[name].magnitudes[index]
            signs = (1, -1) if name in SIGNED else (1,)
            applied = [((name, sign * magnitude), probability / len(signs)) for sign in signs]
            parts.append([(None, 1 - probability), *applied])
        for (step, share), (other_step, other_share) in product(*parts):
            chosen = tuple(part for part in (step, other_step) if part is not None)
            shares[chosen] += share * other_share / len(PUBLISHED[policy])
    return {chosen: share for chosen, share in shares.items() if share > 1e-12}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_the_published_ones(name):
    """At each magnitude and sign; exact with Pillow 9.1, 10, 11, 12 and 13, so no level may differ."""
    golden = arrays("augment")
    keys = [key for key in golden if key.split("_")[1] == name]
    magnitudes = 1 if name in ("autocontrast", "equalize", "invert") else 10
    assert len(keys) == (1 + (name in SIGNED)) * (magnitudes + min(magnitudes, 2))
    operation = OPERATIONS[name]
    assert operation.signed == (name in SIGNED)
    for key in keys:
        image, _, index, sign = key.split("_")
        magnitude = operation.magnitudes[int(index)]
        result = operation.apply(Image.fromarray(golden[f"image_{image}"]), -magnitude if sign == "m" else magnitude)
        np.testing.assert_array_equal(np.asarray(result), golden[key], err_msg=key)


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_channel_is_changed_as_three_equal_ones(name):
    grey = Image.fromarray(arrays("augment")["image_wide"]).convert("L")
    operation = OPERATIONS[name]
    for magnitude in operation.magnitudes:
        for signed in (magnitude, -magnitude) if operation.signed else (magnitude,):
            result = operation.apply(grey, signed)
            assert (result.mode, result.size) == ("L", grey.size)
            of_three = np.asarray(operation.apply(grey.convert("RGB"), signed))
            np.testing.assert_array_equal(np.asarray(result)[..., None].repeat(3, -1), of_three)


def test_policies_equal_the_published_ones():
    assert set(POLICIES) == {"CIFAR", "ImageNet"}
    for name, pairs in POLICIES.items():
        assert [[*first, *second] for first, second in pairs] == PUBLISHED[name]
    assert [len(PUBLISHED[name]) for name in ("CIFAR", "ImageNet")] == [25, 24]


@pytest.mark.parametrize("policy", POLICIES)
def test_draws_have_the_published_shares(policy):
    """Every outcome's share, which a wrong probability, sign, choice of pairs or dependence would change."""
    torch.manual_seed(0)
    draws = 100_000
    transform = AutoAugment(policy)
    counts = Counter(tuple(transform.choose()) for _ in range(draws))
    shares = expected_shares(policy)
    assert math.isclose(sum(shares.values()), 1)
    assert counts.keys() <= shares.keys()
    # Four standard errors of a count, for each outcome; measured at most 2.7.
    away = {chosen: (counts[chosen] - draws * p) / math.sqrt(draws * p * (1 - p)) for chosen, p in shares.items()}
    assert max(map(abs, away.values())) < 4, max(away.items(), key=lambda item: abs(item[1]))
    # The sum of squares over all of them is distributed as chi-square; measured at most 0.5 of its deviations away.
    chi_square = sum((counts[chosen] - draws * p) ** 2 / (draws * p) for chosen, p in shares.items())
    freedom = len(shares) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_draws_are_made_anew_each_time():
    """Neither how many operations an image gets nor their signs say anything about those of the next image."""
    torch.manual_seed(1)
    draws = 20_000
    chosen = [AutoAugment("CIFAR").choose() for _ in range(draws)]
    for number in (len, lambda steps: sum(np.sign(magnitude) for name, magnitude in steps if name in SIGNED)):
        values = np.array([number(steps) for steps in chosen], float)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(draws)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_all_random_numbers_come_from_torch(policy, mode):
    image = Image.fromarray(arrays("augment")["image_wide"]).convert(mode)
    transform = AutoAugment(policy)
    results = []
    for _ in range(2):  # the second with other numbers in the other generators
        torch.manual_seed(2)
        results.append([transform(image) for _ in range(200)])
        random.random(), np.random.random()
    assert results[0] == results[1]
    assert {(result.mode, result.size) for result in results[0]} == {(mode, image.size)}
    assert len({result.tobytes() for result in results[0]}) > 20


def test_it_prints_its_policy_and_travels_to_other_processes():
    """Workers that are spawned get it by pickle."""
    assert repr(AutoAugment("CIFAR")) == "AutoAugment('CIFAR')"
    assert repr(pickle.loads(pickle.dumps(AutoAugment("ImageNet")))) == "AutoAugment('ImageNet')"
