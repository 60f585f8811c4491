"""Spread of repeated measurements: quartiles, and an interval for the median that assumes no distribution."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
METHOD = (
    "ratio: median over the rounds of theirs / ours, both of the same round; interval: order statistics, "
    "distribution-free, the narrowest symmetric pair of ranks that covers the median with probability >= 0.95"
)


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float


class Interval(NamedTuple):
    """Median, the two ends of its interval, and the probability that they enclose the true median."""

    median: float
    low: float
    high: float
    coverage: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles of at least one value; of a single one, three times itself."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def median_interval(values: Sequence[float]) -> Interval:
    """The median of at least one value with its interval by order statistics.

    Of ``n`` independent values the k-th from below and the k-th from above enclose the true median with
    probability ``1 - 2 P(Binomial(n, 1/2) < k)``, whatever their distribution. ``k`` is the largest with
    at least 0.95. Fewer than six values reach that with no ``k``: then it is 1, and ``coverage`` says so.
    """
    ordered, n = sorted(values), len(values)
    rank, coverage = 1, 1 - 2 / 2**n
    missed = 1  # outcomes of n fair coins with fewer than `rank` heads
    for k in range(2, n // 2 + 1):
        missed += math.comb(n, k - 1)
        if 1 - 2 * missed / 2**n < CONFIDENCE:
            break
        rank, coverage = k, 1 - 2 * missed / 2**n
    return Interval(statistics.median(ordered), ordered[rank - 1], ordered[n - rank], max(0.0, coverage))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ours against another.

    Args:
        ratio: their time over ours, see `METHOD`: above 1 ours is faster.
        low, high, coverage: the interval of ``ratio``, and the probability that it holds.
        rounds: how many rounds that is from.
    """

    ours: str
    against: str
    ratio: float
    low: float
    high: float
    coverage: float
    rounds: int

    @property
    def verdict(self) -> str:
        """In words; a difference that the interval does not exclude to be none is none."""
        if self.coverage < CONFIDENCE:
            return "too few rounds to tell"
        if self.low > 1:
            return "ours faster"
        return "ours SLOWER" if self.high < 1 else "no clear difference"

    def __str__(self) -> str:
        return f"{self.ratio:5.2f}x [{self.low:.2f}, {self.high:.2f}]  {self.verdict}"


def compare(ours: str, against: str, own: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Two contestants' seconds, round by round; at least one round."""
    interval = median_interval([b / a for a, b in zip(own, theirs, strict=True)])
    return Comparison(ours, against, *interval, rounds=len(own))
