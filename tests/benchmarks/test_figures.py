"""Figures of what was measured in rounds: their spread, ratios within rounds, exponents of growth, and crossings."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from figures import Figure, crossing, exponent, figure, ratio

POSITIVE = st.floats(1e-6, 1e6)


@given(st.lists(POSITIVE, min_size=1, max_size=60))
def test_spread_leaves_out_the_outer_tenths(rounds):
    found = figure(rounds)
    assert found.low <= found.median <= found.high
    tenth = len(rounds) // 10
    assert sum(value < found.low for value in rounds) <= tenth
    assert sum(value > found.high for value in rounds) <= tenth
    assert {found.low, found.high} <= set(rounds)


def test_few_rounds_lie_all_in_the_spread():
    assert figure([3.0, 1.0, 2.0]) == (2, 1, 3, 3)
    assert figure([float(value) for value in range(1, 21)]) == (10.5, 3, 18, 20)


@given(st.lists(st.tuples(POSITIVE, POSITIVE, st.sampled_from([0.25, 1.0, 8.0])), min_size=1, max_size=30))
def test_what_slows_both_of_a_round_leaves_no_trace(rounds):
    own, others, slow = zip(*rounds, strict=True)
    slowed = ([time * factor for time, factor in zip(times, slow, strict=True)] for times in (own, others))
    assert ratio(*slowed) == ratio(own, others)


def test_ratio_is_of_the_same_round_and_scaled():
    assert ratio([1.0, 6.0, 4.0], [1.0, 2.0, 2.0], 10.0) == (20, 10, 30, 3)
    with pytest.raises(ValueError, match="longer"):
        ratio([1.0], [1.0, 2.0])


def test_shown():
    assert Figure(1.5, 0.25, 12.0, 9).shown("7.2f", 2.0) == "   3.00 (0.50 to 24.00)"
    assert Figure(1.5, 0.25, 12.0, 9).inverse().shown(".2f", 3.0) == "2.00 (0.25 to 12.00)"


@given(st.floats(-1, 3), POSITIVE, st.floats(1, 2), st.integers(2, 9))
def test_exponent_of_a_power(power, factor, spread, count):
    exact = {2.0**size: factor * 2.0 ** (size * power) for size in range(count)}
    found = exponent({size: Figure(time, time / spread, time * spread, 3) for size, time in exact.items()})
    assert found.median == pytest.approx(power, abs=1e-9)  # measured 1e-13
    upper = sorted(exact)[-max(2, (count + 1) // 2) :]
    # Times that grow as fast as their spread lets them, between the ends of the fit.
    steeper = {
        size: exact[size] * spread ** (-1 if size == upper[0] else 1 if size == upper[-1] else 0) for size in exact
    }
    steep = exponent({size: figure([time]) for size, time in steeper.items()}).median
    assert found.low <= 2 * power - steep + 1e-9
    assert found.high >= steep - 1e-9


def test_exponent_is_that_of_the_larger_half():
    times = {1: 1.0, 2: 1.0, 4: 1.0, 8: 4.0, 16: 16.0, 32: 64.0, 64: 256.0}
    found = exponent({size: figure([time] * (5 - size // 32)) for size, time in times.items()})
    assert found == pytest.approx((2, 2, 2, 3))


@given(st.floats(0.1, 10), st.floats(1.5, 100), st.floats(1, 1.2), st.integers(2, 30))
def test_crossing_of_an_exponential(where, steepness, spread, count):
    points = {
        10 * step / count: Figure(value, value / spread, value * spread, 3)
        for step in range(count + 1)
        for value in [steepness ** (where - 10 * step / count)]
    }
    found = crossing(points)
    assert found.rounds == 3
    apart = math.log(spread) / math.log(steepness)
    for crossed, expected in zip(found, (where, where - apart, where + apart), strict=False):
        if 1e-6 < expected < 10 - 1e-6:
            assert crossed == pytest.approx(expected, abs=1e-6)  # measured 1e-13


def test_crossing_is_the_first_one_or_beyond_the_sizes():
    values = {1: 4.0, 2: 2.0, 3: 0.5, 4: 2.0, 5: 0.25}
    assert crossing({size: figure([value]) for size, value in values.items()}) == (2.5, 2.5, 2.5, 1)
    assert crossing({3: figure([0.5, 0.9]), 4: figure([0.25])}) == (-math.inf, -math.inf, -math.inf, 1)
    assert crossing({1: figure([2.0, 0.5, 2.0]), 2: figure([1.0])}) == (math.inf, -math.inf, math.inf, 1)
