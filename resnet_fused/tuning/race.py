"""Candidates timed in turns, and when a difference counts as one."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

LEAST_GAIN = 1.02  # a candidate replaces the default only if it is faster by more than this
LEAST_ROUNDS, MOST_ROUNDS = 5, 25
_SHORTEST = 2e-3  # seconds of one timing on a CPU; what is quicker is run several times
_MOST_REPEATS = 64
_LARGEST_L2 = 2**27  # bytes; for a device that does not say
_WARM_UPS = 2
_SHARE = 0.25  # of the time left, for one race
Run = Callable[[], object]


class Spread(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float


def spread(values: list[float]) -> Spread:
    """The quartiles of ``values``; of a single one, three times itself."""
    if len(values) == 1:
        return Spread(*values * 3)
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


class Timer:
    """Times a function on a device: CUDA events with a cold L2 cache on a GPU, the wall clock elsewhere.

    Args:
        device: where the function runs.  clock: seconds, increasing; it also tells when the time is up.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.now = clock
        self._flush: torch.Tensor | None = None

    def seconds(self, run: Run, repeats: int = 1) -> float:
        """Seconds of one call, the mean of ``repeats``."""
        if self.device.type == "cuda":
            return self._events(run)
        start = self.now()
        for _ in range(repeats):
            run()
        return (self.now() - start) / repeats

    def repeats(self, run: Run) -> int:
        """How many calls make a timing long enough for the clock."""
        if self.device.type == "cuda":
            return 1
        once = self.seconds(run)
        return _MOST_REPEATS if once <= 0 else max(1, min(_MOST_REPEATS, math.ceil(_SHORTEST / once)))

    def _events(self, run: Run) -> float:
        if self._flush is None:
            cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or _LARGEST_L2
            self._flush = torch.empty(2 * cache, dtype=torch.int8, device=self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A race's times in seconds by name, one per round; the first name is the default."""

    seconds: Mapping[str, list[float]]

    @property
    def default(self) -> str:
        """The name that wins unless another is clearly faster."""
        return next(iter(self.seconds))

    def times(self) -> dict[str, Spread]:
        """Quartiles of each name's times in ms."""
        return {name: spread([1e3 * s for s in seconds]) for name, seconds in self.seconds.items()}

    def ratio(self, name: str) -> Spread:
        """The default's time over that of ``name``, round by round: above 1 ``name`` is faster."""
        return spread([a / max(b, 1e-12) for a, b in zip(self.seconds[self.default], self.seconds[name])])

    def winner(self) -> str:
        """The fastest of the clearly faster ones, else the default."""

        def clear(name: str) -> bool:
            ratio = self.ratio(name)
            return ratio.median > LEAST_GAIN and ratio.low > 1

        faster = [name for name in self.seconds if name != self.default and clear(name)]
        return min(faster, key=lambda name: self.times()[name].median, default=self.default)

    def slower(self, name: str) -> bool:
        """Whether ``name`` is slower than the default by more than the spread of the rounds."""
        ratio = self.ratio(name)
        return ratio.median < 1 and ratio.high < 1


def race(
    runs: Mapping[str, Run],
    timer: Timer,
    until: float,
    least: int = LEAST_ROUNDS,
    most: int = MOST_ROUNDS,
    warm_ups: int = _WARM_UPS,
) -> Outcome | None:
    """Run every function once per round, the starter changing, for `_SHARE` of the time until ``until``.

    Args:
        runs: by name, the default first.  until: by the clock of ``timer``.
        least, most: rounds; up to ``least`` the race takes all the time there is.  warm_ups: untimed rounds before.

    Returns:
        None when the time was up before ``least`` rounds: too few to decide by.
    """
    for _ in range(warm_ups):
        for run in runs.values():
            if timer.now() >= until:
                return None
            run()
    names = list(runs)
    repeats = timer.repeats(runs[names[0]])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    enough = timer.now() + _SHARE * (until - timer.now())
    for done in range(most):
        if timer.now() >= (enough if done >= least else until):
            return Outcome(seconds) if done >= least else None
        first = done % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timer.seconds(runs[name], repeats))
    return Outcome(seconds)
