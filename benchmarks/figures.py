"""Figures with their spread, from what was measured in rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple


class Figure(NamedTuple):
    """A median, between which of its rounds all but the smallest and the largest tenth lie, and how many there are."""

    median: float
    low: float
    high: float
    rounds: int

    def shown(self, form: str, scale: float = 1.0) -> str:
        """As text, each number times `scale` in the format `form`."""
        median, low, high = (f"{scale * number:{form}}" for number in self[:3])
        return f"{median} ({low.strip()} to {high.strip()})"

    def inverse(self) -> Figure:
        """Of speeds, where this is of times, and the other way round."""
        return Figure(1 / self.median, 1 / self.high, 1 / self.low, self.rounds)

    def differs(self, other: Figure) -> bool:
        """Whether the two lie apart with all their spread."""
        return max(self.low, other.low) > min(self.high, other.high)


def figure(rounds: Iterable[float]) -> Figure:
    """The figure of a quantity's rounds."""
    ordered = sorted(rounds)
    tenth = len(ordered) // 10
    return Figure(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))


def ratio(times: list[float], others: list[float], scale: float = 1.0) -> Figure:
    """Times by another contestant's of the same rounds, times `scale`: what slows both alike leaves no trace."""
    return figure(scale * time / other for time, other in zip(times, others, strict=True))


def exponent(times: dict[float, Figure]) -> Figure:
    """The p of time ~ size^p over the upper half of the sizes, by least squares of the logarithms.

    Args:
        times: Size -> seconds, of two sizes or more.

    Returns:
        The p of the medians; its least and its greatest, should each time lie anywhere in its spread.
    """
    upper = sorted(times.items())[-max(2, (len(times) + 1) // 2) :]
    sizes = [math.log(size) for size, _ in upper]
    centre = statistics.fmean(sizes)
    squares = sum((size - centre) ** 2 for size in sizes)
    # What each size adds to the slope: with its median, and with the bounds of its spread.
    shares = [
        [(size - centre) / squares * math.log(bound) for bound in seconds[:3]]
        for size, (_, seconds) in zip(sizes, upper, strict=True)
    ]
    return Figure(
        sum(median for median, _, _ in shares),
        sum(min(bounds) for _, *bounds in shares),
        sum(max(bounds) for _, *bounds in shares),
        min(seconds.rounds for _, seconds in upper),
    )


def crossing(points: dict[float, Figure]) -> Figure:
    """Where what falls from above 1 to below it passes 1, by linear interpolation of its logarithm.

    Args:
        points: Size -> what falls, of one size or more.

    Returns:
        The first crossing of the medians; that of the lows and that of the highs. Minus infinity stands for a first
        point below 1 already, and infinity for none below it.
    """
    bounds = [{size: point[index] for size, point in sorted(points.items())} for index in range(3)]
    return Figure(*map(_crossing, bounds), min(point.rounds for point in points.values()))


def _crossing(points: dict[float, float]) -> float:
    before = None
    for size, value in points.items():
        if value < 1:
            if before is None:
                return -math.inf
            left, high = before
            return left + (size - left) * math.log(high) / (math.log(high) - math.log(value))
        before = size, value
    return math.inf
