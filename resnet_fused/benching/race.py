"""Steps timed in turns, so that a change of the machine's mood falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from .spread import Comparison, compare, quartiles

Mark = Callable[[str], None]
"""Called by a step where a phase of it ends, with the phase's name."""
Step = Callable[[Mark], object]


class Lap(NamedTuple):
    """Seconds of one step, and of its phases by name."""

    seconds: float
    phases: dict[str, float]


class Clock(Protocol):
    """Times one step."""

    def start(self) -> None:
        """The step begins."""

    def mark(self, phase: str) -> None:
        """A phase ends, and the next one begins."""

    def stop(self) -> Lap:
        """The step has ended."""


class HostClock:
    """The processor's own clock."""

    def start(self) -> None:
        """The step begins."""
        self._phases: list[tuple[str, float]] = []
        self._start = time.perf_counter()

    def mark(self, phase: str) -> None:
        """A phase ends, and the next one begins."""
        self._phases.append((phase, time.perf_counter()))

    def stop(self) -> Lap:
        """The step has ended."""
        end = time.perf_counter()
        times = [self._start, *(at for _, at in self._phases)]
        return Lap(end - self._start, {name: b - a for (name, b), a in zip(self._phases, times)})


class DeviceClock:
    """Events on a GPU's stream. Its L2 cache is overwritten before every step, so none finds its data there.

    The overwriting also keeps the GPU busy while the first kernels of the step are launched.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * cache, 1 << 25), dtype=torch.int8, device=device)
        self._device = device

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def start(self) -> None:
        """The step begins."""
        torch.cuda.synchronize(self._device)
        self._flush.zero_()
        self._phases: list[tuple[str, torch.cuda.Event]] = []
        self._start = self._event()

    def mark(self, phase: str) -> None:
        """A phase ends, and the next one begins."""
        self._phases.append((phase, self._event()))

    def stop(self) -> Lap:
        """The step has ended: wait for it."""
        end = self._event()
        torch.cuda.synchronize(self._device)
        events = [self._start, *(event for _, event in self._phases)]
        phases = {name: a.elapsed_time(b) / 1e3 for (name, b), a in zip(self._phases, events)}
        return Lap(self._start.elapsed_time(end) / 1e3, phases)


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def whole(function: Callable[[], object]) -> Step:
    """A function without phases as a step."""
    return lambda mark: function()


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    words = str(error).strip()
    return f"{type(error).__name__}: {words.splitlines()[0]}"[:240] if words else type(error).__name__


class Race:
    """Named steps that run once each per round, the starter changing from round to round.

    A step that raises leaves the race: `failed` says why, and the others go on. A round that is
    interrupted counts for nobody.

    Args:
        steps: by name.  clock: None is the processor's.
    """

    def __init__(self, steps: Mapping[str, Step], clock: Clock | None = None) -> None:
        self.steps = dict(steps)
        self.laps: dict[str, list[Lap]] = {name: [] for name in steps}
        self.failed: dict[str, str] = {}
        self.rounds = 0
        self._clock = clock if clock is not None else HostClock()

    def warm_up(self, rounds: int, name: str | None = None) -> None:
        """Untimed steps, of all or of one: compilation, first allocations."""
        for each in list(self.steps) if name is None else [name]:
            for _ in range(rounds):
                self.attempt(each, lambda step: step(_ignore))

    def attempt(self, name: str, use: Callable[[Step], object]) -> None:
        """Let ``use`` run a step that is still in the race; one that raises leaves it."""
        if name not in self.steps:
            return
        try:
            use(self.steps[name])
        except Exception as error:
            self.failed[name] = first_line(error)
            del self.steps[name]  # and with it what it holds on to

    def round(self) -> None:
        """Every step once, timed."""
        names = list(self.steps)
        laps: dict[str, Lap] = {}

        def timed(step: Step) -> None:
            self._clock.start()
            step(self._clock.mark)
            laps[name] = self._clock.stop()

        first = self.rounds % max(1, len(names))
        for name in names[first:] + names[:first]:
            self.attempt(name, timed)
        for name, lap in laps.items():
            self.laps[name].append(lap)
        self.rounds += 1

    def seconds(self, name: str, phase: str | None = None) -> list[float]:
        """Of every round, of the whole step or of one phase."""
        return [lap.seconds if phase is None else lap.phases[phase] for lap in self.laps[name]]

    def figures(self, name: str) -> dict[str, Any]:
        """Seconds of every round and quartiles in milliseconds, of the step and of its phases, in plain types."""
        phases = self.laps[name][0].phases
        seconds = {"step": self.seconds(name)} | {phase: self.seconds(name, phase) for phase in phases}
        spread = {phase: quartiles([1e3 * s for s in values])._asdict() for phase, values in seconds.items()}
        return {"seconds": seconds, "milliseconds": spread}

    def finished(self) -> list[str]:
        """Names of those that ran every round, in order of entry."""
        return [name for name in self.laps if name in self.steps and self.rounds]

    def compare(self, ours: str, against: str) -> Comparison:
        """One that finished against another that did."""
        return compare(ours, against, self.seconds(ours), self.seconds(against))


def _ignore(phase: str) -> None:
    """A phase of a step that is not timed."""
