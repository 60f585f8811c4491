"""What `tune` did, to print and to keep."""

from __future__ import annotations

import dataclasses
from typing import Any

from .measure import Measured
from .race import Spread

COLUMNS = ("problem", "calls", "default", "winner", "ms [quartiles]", "default / other", "")


def _spread(values: Spread, digits: int = 3) -> str:
    return f"{values.median:.{digits}g} [{values.low:.{digits}g}, {values.high:.{digits}g}]"


@dataclasses.dataclass(frozen=True, repr=False)
class TuneReport:
    """The result of `resnet_fused.tune`; it prints as a table.

    Args:
        device: its name.  measured: one record per decision.  undecided: problems that the time did not reach, or
            that could not be measured; they stay on the rules.
        step: time of a training step before over after, quartiles over the rounds; None when nothing changed.
        vetoed: whole steps were slower with the new winners, so these were dropped.
        written: the file, None when none was written.  notes: what else there is to say.
        seconds: how long it took.  interrupted: by Ctrl-C; what was finished is kept.
        digest: of the table in use afterwards, on every rank the same.
    """

    device: str
    measured: tuple[Measured, ...]
    undecided: int
    step: Spread | None
    vetoed: bool
    written: str | None
    notes: tuple[str, ...]
    seconds: float
    interrupted: bool
    digest: str

    @property
    def changed(self) -> tuple[Measured, ...]:
        """The decisions that are not the rules'."""
        return tuple(m for m in self.measured if m.winner != m.default)

    def rows(self) -> list[list[str]]:
        """The table, under `COLUMNS`."""
        rows = []
        for m in self.measured:
            times = "; ".join(f"{name} {_spread(spread)}" for name, spread in m.times.items())
            ratio = _spread(m.ratio) if len(m.times) > 1 else "-"
            rows.append([m.problem, str(m.count), m.default, m.winner, times, ratio, "; ".join(m.notes)])
        return rows

    def summary(self) -> list[str]:
        """What the table does not say, in lines."""
        lines = [f"{self.device}: {len(self.measured)} decisions, {len(self.changed)} of them not the rules' own"]
        if self.undecided:
            why = "Ctrl-C came" if self.interrupted else "the time was up, or they could not be measured"
            lines.append(f"left to the rules: {self.undecided} more, as {why}")
        if self.step is not None:
            lines.append(f"training step, before / tuned: {_spread(self.step)}")
        elif self.changed and not self.interrupted:
            lines.append("training step: as before, these choices were in use already")
        if self.vetoed:
            lines.append("whole steps were slower with the new winners: they are dropped")
        lines += self.notes
        lines.append(f"kept in {self.written}" if self.written else "nothing was written")
        lines.append(f"{self.seconds:.1f} s{', interrupted' if self.interrupted else ''}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        rows = [list(COLUMNS), *self.rows()] if self.measured else []
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))] if rows else []
        table = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*table, *self.summary()])
