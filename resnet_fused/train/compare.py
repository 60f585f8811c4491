"""What a comparison run comes to, in numbers and in words."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

from .history import History
from .lanes import FUSED, STOCK, YARDSTICK

# Steps left out of the timing at the start: allocators, oneDNN's primitive caches and autotuning warm up there.
_WARMUP_STEPS = 5
_FIRST_STEPS = 10
_VISIBLE = 0.01


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far two loss curves part.

    Args:
        first: the largest difference in the first 10 steps.  visible: the first iteration, counted from 1,
            whose losses differ by more than 0.01, or None.  largest, at: the largest difference and its iteration.
    """

    first: float
    visible: int | None
    largest: float
    at: int


def divergence(ours: list[float], theirs: list[float]) -> Divergence:
    """Compare two loss curves step by step; a NaN on one side only counts as infinite."""
    gaps = [_gap(a, b) for a, b in zip(ours, theirs, strict=True)]
    largest = max(gaps, default=0.0)
    visible = next((i + 1 for i, gap in enumerate(gaps) if gap > _VISIBLE), None)
    return Divergence(max(gaps[:_FIRST_STEPS], default=0.0), visible, largest, gaps.index(largest) + 1 if gaps else 0)


def _gap(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return abs(a - b)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Images per second by the median step, and the ratio of two lanes with the quartiles of its steps."""

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float


def speed(ours: list[float], theirs: list[float], batch_size: int) -> Speed | None:
    """Ratio of the median seconds per step; None for a run too short to time.

    The two lanes take turns within every iteration, so a busy machine slows both, and each iteration
    gives a ratio of its own: their quartiles are the spread.
    """
    ours, theirs = ours[_WARMUP_STEPS:], theirs[_WARMUP_STEPS:]
    if len(ours) < 2:
        return None
    low, _, high = statistics.quantiles((b / a for a, b in zip(ours, theirs)), n=4)
    a, b = statistics.median(ours), statistics.median(theirs)
    return Speed(batch_size / a, batch_size / b, b / a, low, high)


def _divergence_words(parted: Divergence) -> str:
    if not parted.largest:
        return "none: equal in every step"
    early = f"at most {parted.first:.1e} in the first {_FIRST_STEPS} steps"
    visible = f", above {_VISIBLE} from iteration {parted.visible}" if parted.visible else ""
    return f"largest {parted.largest:.2e} at iteration {parted.at}; {early}{visible}"


def summarise(history: History, batch_size: int, kept: dict[str, int], timed: bool = True) -> dict[str, Any]:
    """The end of a run as plain data: accuracy, images per second, memory, and divergence where compared.

    Args:
        history: of the whole run.
        batch_size: images per step.
        kept: bytes kept for backward per lane, for one batch.
        timed: whether the lanes' seconds can be compared.
    """
    last = history.evaluations[-1] if history.evaluations else {}
    seconds = {name: values[_WARMUP_STEPS:] or values for name, values in history.seconds.items()}
    result: dict[str, Any] = {
        "evaluated": history.evaluated,
        "accuracy": last.get("accuracy", {}),
        "images_per_second": {n: batch_size / statistics.median(v) for n, v in seconds.items() if v},
        "kept_for_backward_bytes": kept,
    }
    if STOCK in history.lanes:
        found = speed(history.seconds[FUSED], history.seconds[STOCK], batch_size) if timed else None
        result["speed"] = None if found is None else dataclasses.asdict(found)
        result["divergence"] = dataclasses.asdict(divergence(history.losses[FUSED], history.losses[STOCK]))
    if YARDSTICK in history.lanes:
        parted = divergence(history.losses[YARDSTICK], history.losses[STOCK])
        result["yardstick_divergence"] = dataclasses.asdict(parted)
    return result


def describe(summary: dict[str, Any], batch_size: int) -> list[str]:
    """`summarise` as lines for a person."""

    def row(label: str, values: dict[str, Any], form: str, note: str = "") -> str:
        cells = "   ".join(f"{name} {format(value, form)}" for name, value in values.items())
        return f"{label:<20}{cells}{note}"

    lines = []
    if summary["accuracy"]:
        lines.append(row(f"{summary['evaluated']} accuracy", summary["accuracy"], ".2%"))
    note, timed = "", summary.get("speed")
    if timed is not None:
        note = f"   ratio {timed['ratio']:.2f}x (quartiles {timed['low']:.2f} to {timed['high']:.2f})"
    lines.append(row("images/s, training", summary["images_per_second"], ".1f", note))
    kept, note = summary["kept_for_backward_bytes"], f"   per batch of {batch_size}"
    if STOCK in kept:
        note += f", ratio {kept[FUSED] / kept[STOCK]:.2f}x"
    lines.append(row("MB for backward", {n: v / 1e6 for n, v in kept.items()}, ".1f", note))
    if "divergence" in summary:
        lines.append(f"{'loss, fused - stock':<20}{_divergence_words(Divergence(**summary['divergence']))}")
    if "yardstick_divergence" in summary:
        parted = Divergence(**summary["yardstick_divergence"])
        lines.append(f"{'stock, two layouts':<20}{_divergence_words(parted)}")
    return lines
