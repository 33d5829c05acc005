"""Figures of lines and contenders, and how two contenders compare within the same rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: From so many rounds on the quartiles stand for the scatter, and a median has a 95 % interval.
MANY = 6


class Missing(Exception):
    """A contender isn't there; the text names what is missing."""


class Unit(NamedTuple):
    """What a line's figures are in, and which way is good."""

    name: str
    higher_is_better: bool = False


MICROSECONDS, MILLISECONDS, SECONDS = Unit("µs"), Unit("ms"), Unit("s")
OPERATIONS = Unit("op/s", higher_is_better=True)


@dataclass(frozen=True)
class Figure:
    """All rounds of one line of one contender. `missing` names why there are none, or no more."""

    line: str
    contender: str
    unit: str
    higher_is_better: bool
    values: tuple[float, ...]
    missing: str = ""

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the distance of the extremes, with many rounds of the quartiles; a share of the median."""
        if not self.values or not self.median:
            return 0.0
        low, high = min(self.values), max(self.values)
        if len(self.values) >= MANY:
            low, _, high = statistics.quantiles(self.values, n=4)
        return (high - low) / 2 / self.median


class Ratio(NamedTuple):
    """A multiple of the base's time, and where it lies for certain enough."""

    value: float
    low: float
    high: float

    @property
    def uncertainty(self) -> float:
        """Half the interval, as a share of the value."""
        return (self.high - self.low) / 2 / self.value


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median, by order statistics; of few values the extremes."""
    ordered = sorted(values)
    # 0.98 = 1.96 / 2: the ranks that a binomial of n and 1/2 leaves with 2.5 % on each side.
    rank = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))))
    return ordered[rank], ordered[-1 - rank]


def ratio(figure: Figure, base: Figure | None) -> Ratio | None:
    """How many times the base's *time* it takes (for rates: base / figure); None without a base.

    The median of the ratios within each round: what slows the machine for a while slows both.
    """
    if base is None:
        return None
    pairs = [
        (own, other)
        for own, other in zip(figure.values, base.values, strict=False)
        if own and other
    ]
    if not pairs:
        return None
    times = [b / a if figure.higher_is_better else a / b for a, b in pairs]
    return Ratio(statistics.median(times), *interval(times))
