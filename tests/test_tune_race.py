"""Timing by a clock of our own: noise flips nothing, a clear winner flips, and the time limit holds."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from resnet_fused.tuning.race import LEAST_ROUNDS, MOST_ROUNDS, Outcome, Timer, race, spread


class Clock:
    """A clock that only candidates move; ``tick`` makes a candidate that takes so many seconds."""

    def __init__(self):
        self.now = 0.0
        self.random = random.Random(0)
        self.order = []

    def __call__(self):
        return self.now

    def tick(self, name, seconds, noise=0.0):
        def run():
            self.order.append(name)
            self.now += seconds * (1 + noise * self.random.uniform(-1, 1))

        return run

    def timer(self):
        return Timer(torch.device("cpu"), self)


def raced(until=1e9, **candidates):
    clock = Clock()
    runs = {name: clock.tick(name, *timing) for name, timing in candidates.items()}
    return race(runs, clock.timer(), until), clock


@pytest.mark.parametrize(
    ("other", "winner"),
    [
        ((0.010, 0.2), "own"),  # as fast, with noise
        ((0.0099, 0.0), "own"),  # faster, by less than two per cent
        ((0.0097, 0.2), "own"),  # faster in the mean, within the noise
        ((0.0090, 0.02), "library"),
        ((0.0097, 0.001), "library"),
        ((0.0110, 0.0), "own"),
    ],
)
def test_only_a_clear_winner_replaces_the_default(other, winner):
    outcome, _ = raced(own=(0.010, 0.2 if other[1] > 0.1 else other[1]), library=other)
    assert outcome.winner() == winner


def test_a_gain_in_some_rounds_alone_is_none():
    assert Outcome({"own": [1.0] * 5, "library": [2.0, 2.0, 0.9, 0.9, 0.9]}).winner() == "own"
    assert Outcome({"own": [1.0] * 5, "library": [2.0, 0.9, 0.9, 0.9, 0.9]}).winner() == "library"


def test_the_fastest_of_the_clear_winners_wins():
    outcome, _ = raced(a=(0.010,), b=(0.008,), c=(0.007,), d=(0.0069, 0.3))
    assert outcome.winner() in ("c", "d") and outcome.default == "a"
    assert outcome.ratio("c") == pytest.approx((10 / 7,) * 3)
    assert outcome.times()["b"].median == pytest.approx(8.0)


def test_slower_is_more_than_noise():
    assert raced(before=(0.010,), tuned=(0.0101,))[0].slower("tuned")
    assert not raced(before=(0.010, 0.2), tuned=(0.0101, 0.2))[0].slower("tuned")
    assert not raced(before=(0.010,), tuned=(0.010,))[0].slower("tuned")


def test_rounds_are_interleaved_and_the_starter_changes():
    _, clock = raced(a=(1.0,), b=(1.0,))
    timed = "".join(clock.order[5:])  # two rounds of warm-up, and one call to choose the repeats
    assert timed == ("abba" * MOST_ROUNDS)[: 2 * MOST_ROUNDS]


@pytest.mark.parametrize("until", [0.0, 3.0, 12.0])
def test_too_few_rounds_decide_nothing(until):
    outcome, clock = raced(until, a=(1.0,), b=(1.0,))
    assert outcome is None and clock.now <= until + 2


def test_a_race_takes_a_share_of_the_time_but_its_least_rounds_all_of_it():
    outcome, clock = raced(1000.0, a=(10.0,), b=(10.0,))
    assert LEAST_ROUNDS < len(outcome.seconds["a"]) < MOST_ROUNDS and clock.now < 400
    outcome, _ = raced(160.0, a=(10.0,), b=(10.0,))
    assert len(outcome.seconds["b"]) == LEAST_ROUNDS


def test_what_is_quick_is_repeated():
    outcome, clock = raced(a=(0.0005,), b=(0.0005,))
    assert clock.order[5:9] == ["a"] * 4
    assert spread(outcome.seconds["a"]) == pytest.approx((0.0005,) * 3)


def test_quartiles():
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert Outcome({"a": [1.0], "b": [2.0]}).winner() == "a"


def test_on_a_gpu_events_are_recorded_around_the_run_after_the_cache_is_flushed(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("synchronize")

        def elapsed_time(self, end):
            return 4.0

    class Flush:
        def zero_(self):
            order.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(torch, "empty", lambda size, **_: order.append(size) or Flush())
    timer = Timer(torch.device("cuda", 0))
    assert timer.repeats(lambda: None) == 1
    assert timer.seconds(lambda: order.append("run"), 7) == pytest.approx(0.004)
    assert order == [2000, "flush", "record", "run", "record", "synchronize"]
