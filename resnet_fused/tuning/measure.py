"""Measuring one problem after another, the most expensive first, until all are done or the time is up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from .. import plan
from ..winners import Winner
from . import candidates
from .candidates import Candidate
from .race import Outcome, Spread, Timer, race
from .sites import Inputs, SiteProblem, make_inputs

Progress = Callable[[int, int, str], object]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One decision.

    Args:
        problem: in words.  key: in those of `winners`.  count: calls per step.  default, winner: names of candidates.
        times: quartiles in ms by name, of a forward and a backward (of a tile: of its own product).
        ratio: the default's time over that of the winner, or of the best other; quartiles over the rounds.
        notes: what was dropped, and why.
    """

    problem: str
    key: str
    count: int
    default: str
    winner: str
    times: dict[str, Spread]
    ratio: Spread
    notes: tuple[str, ...] = ()


class Measurement:
    """The work of one `tune`: problems in, decisions and a table of winners out.

    Args:
        problems: the most expensive first.  until: when to stop, by the clock of ``timer``.
        progress: called with decisions done, decisions in all, and words.
    """

    def __init__(
        self, problems: list[SiteProblem], device: torch.device, timer: Timer, until: float, progress: Progress
    ) -> None:
        self.device, self.timer, self.until, self.progress = device, timer, until, progress
        self.open = [problem for problem in problems if len(candidates.variants(problem)) > 1]
        self.measured: list[Measured] = []
        self.table: dict[str, Winner] = {}
        self.defaults: dict[str, str | tuple[int, ...]] = {}  # the rules' own choices
        self.notes: list[str] = []
        self.undecided = len(self.open)
        self._tiles: dict[str, Winner] = {}

    def run(self) -> None:
        """First who runs each problem, then the tiles of our kernels where they run."""
        tiled = [problem for problem in self.open if problem.engine == "triton"]
        total = len(self.open) + len(tiled)
        for done, (problem, work) in enumerate(
            [(p, self._variants) for p in self.open] + [(p, self._tiles_of) for p in tiled]
        ):
            if self.timer.now() >= self.until:
                return
            self.progress(done, total, str(problem))
            self._guarded(problem, work)
        self.progress(total, total, "done")

    def _guarded(self, problem: SiteProblem, work: Callable[[SiteProblem, list[Inputs]], None]) -> None:
        """``work`` on the problem; what cannot be set up, for want of memory say, stays on the rules."""
        try:
            with torch.no_grad():
                prepared = [make_inputs(use, problem.key, self.device) for use in problem.uses]
                work(problem, prepared)
        except Exception as error:
            self.notes.append(f"{problem}: stays on the rules: {type(error).__name__}: {_first_line(error)}")

    def _race(
        self,
        tried: list[Candidate],
        problem: SiteProblem,
        prepared: list[Inputs],
        part: str | None = None,
    ) -> tuple[Outcome | None, list[str]]:
        """The race of those candidates that are right, and why the others are not."""
        found = candidates.faults(tried, problem, prepared, part)
        right = [candidate for candidate in tried if candidate.name not in found]
        runs = {candidate.name: candidates.timed(candidate, prepared, part) for candidate in right}
        dropped = [f"{name} dropped: {reason}" for name, reason in found.items()]
        return race(runs, self.timer, self.until) if runs else None, dropped

    def _variants(self, problem: SiteProblem, prepared: list[Inputs]) -> None:
        tried = [candidates.variant(problem, name, self._tiles) for name in candidates.variants(problem)]
        outcome, dropped = self._race(tried, problem, prepared)
        if outcome is None:
            self.notes += [f"{problem}: {note}" for note in dropped]
            return
        if problem.key not in self.table:
            self.undecided -= 1
        self.defaults[problem.key] = tried[0].name
        self._keep(problem.key, str(problem), problem.count, outcome, dropped, outcome.winner())

    def _tiles_of(self, problem: SiteProblem, prepared: list[Inputs]) -> None:
        """The tiles of our kernels for a problem that they run or may run; then who runs it, once more."""
        if plan.OWN not in candidates.variants(problem):
            return
        found: dict[str, Winner] = {}
        for kind in candidates.TILED:
            own = candidates.variant(problem, plan.OWN, {**self._tiles, **found})
            for key, (product, target) in candidates.tile_problems(kind, own, prepared).items():
                if key in self.table or self.timer.now() >= self.until:
                    continue
                tried = candidates.tile_candidates(key, product, target, own)
                outcome, dropped = self._race(tried, problem, prepared, kind)
                if outcome is None:
                    self.notes += [f"{problem}: tile of {kind}: {note}" for note in dropped]
                    continue
                best = next(c for c in tried if c.name == outcome.winner())
                found[key] = best.table[key]
                self.defaults[key] = tried[0].table[key].choice
                self._keep(key, f"{problem}: tile of {kind}", problem.count, outcome, dropped, best.table[key].choice)
        self._tiles.update(found)
        if found:
            self._variants(problem, prepared)

    def _keep(
        self, key: str, words: str, count: int, outcome: Outcome, dropped: list[str], choice: str | tuple[int, ...]
    ) -> None:
        winner, times = outcome.winner(), outcome.times()
        others = [name for name in times if name != outcome.default]
        best = winner if winner != outcome.default else min(others, key=lambda n: times[n].median, default=winner)
        said = ", ".join(f"{name} {spread.median:.3g} ms" for name, spread in times.items())
        clear = "" if winner != outcome.default or not others else "; no other is clearly faster"
        self.measured = [m for m in self.measured if m.key != key]
        self.measured.append(
            Measured(words, key, count, outcome.default, winner, times, outcome.ratio(best), tuple(dropped))
        )
        self.table[key] = Winner(choice, f"measured: {said}{clear}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]
