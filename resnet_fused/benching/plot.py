"""A benchmark's document as a PNG: times beside memory, one panel for every network and mode."""

from __future__ import annotations

import io
from typing import Any

from .report import failures, machine_line, setting_line

_OURS, _THEIRS, _INK, _GRID, _LOSS = "#d1495b", "#8d99ae", "#2b2d42", "#e4e6eb", "#9a1b2f"
_SHADES = {"forward": 1.0, "backward": 0.72, "optimizer": 0.42}
_BAR, _HEAD, _FOOT = 0.42, 1.15, 0.95  # inches: a bar's row, a panel's title and axis, the figure's footer


def draw(document: dict[str, Any]) -> bytes:
    """The picture, as the bytes of a PNG file; needs matplotlib."""
    # The object interface: no global figure, no display, no backend of the user's touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = [result for result in document["results"] if _ran(result)]
    rows = [len(_ran(result)) for result in results] or [1]
    heights = [_HEAD + _BAR * n for n in rows]
    footer = _footer(document)
    foot = _FOOT + 0.16 * footer.count("\n")
    total = sum(heights) + foot + 0.5
    figure = Figure(figsize=(11.5, total), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(heights), 2, width_ratios=(2.3, 1), height_ratios=heights, wspace=0.06,
        left=0.17, right=0.965, top=1 - 0.95 / total, bottom=(foot + 0.25) / total, hspace=_HEAD / max(heights) * 0.9,
    )  # fmt: skip
    for number, result in enumerate(results):
        times = figure.add_subplot(grid[number, 0])
        _time_panel(times, result)
        _memory_panel(figure.add_subplot(grid[number, 1]), result)
    if not results:
        figure.text(0.5, 0.5, "nothing was timed", ha="center", color=_INK, fontsize=13)
    figure.suptitle(
        "resnet_fused against the others", x=0.02, y=1 - 0.12 / total, ha="left", va="top",
        fontsize=14, fontweight="bold", color=_INK,
    )  # fmt: skip
    figure.text(0.02, 0.12 / total, footer, fontsize=7.5, color=_INK, va="bottom", linespacing=1.5)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _footer(document: dict[str, Any]) -> str:
    lines = [
        setting_line(document)
        + "; bars are medians, whiskers quartiles; ratios are theirs / ours, in brackets their interval",
        machine_line(document),
    ]
    lines += [f"{line[:150]}..." if len(line) > 150 else line for line in failures(document)]
    if document["interrupted"]:
        lines[0] = f"INTERRUPTED; {lines[0]}"
    return "\n".join(lines)


def _ran(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Who has times, from the top: ours first, then the others from fast to slow."""
    rows = [row for row in result["contestants"] if "milliseconds" in row]
    return sorted(rows, key=lambda row: (not row["ours"], row["milliseconds"]["step"]["median"]))


def _colour(row: dict[str, Any]) -> str:
    return _OURS if row["ours"] else _THEIRS


def _time_panel(axes: Any, result: dict[str, Any]) -> None:
    rows = _ran(result)
    for place, row in enumerate(rows):
        step = row["milliseconds"]["step"]
        _bar(axes, place, row)
        axes.errorbar(
            step["median"], place, xerr=[[step["median"] - step["low"]], [step["high"] - step["median"]]],
            color=_INK, capsize=3, linewidth=1.1,
        )  # fmt: skip
        _label(axes, place, result, row)
    longest = max(row["milliseconds"]["step"]["high"] for row in rows)
    axes.set_xlim(0, longest * 1.6)
    kind = "training step" if result["mode"] == "train" else "inference"
    shades = " (forward, backward, optimizer from dark to light)" if result["mode"] == "train" else ""
    ours = {pair["ours"] for pair in result["comparisons"]}
    against = f"; ratios to {result['comparisons'][0]['ours']}" if len(ours) > 1 else ""
    _dress(axes, rows, f"{result['model']}, {kind}", f"ms{shades}{against}")
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows):
        tick.set_color(_OURS if row["ours"] else _INK)
        tick.set_fontweight("bold" if row["ours"] else "normal")


def _bar(axes: Any, place: int, row: dict[str, Any]) -> None:
    """One bar in the shares of its phases; their medians need not add up to the step's, so they are scaled to it."""
    times = row["milliseconds"]
    phases = {name: times[name]["median"] for name in _SHADES if name in times}
    scale = times["step"]["median"] / sum(phases.values())
    left = 0.0
    for name, value in phases.items():
        axes.barh(place, value * scale, left=left, height=0.62, color=_colour(row), alpha=_SHADES[name], linewidth=0)
        left += value * scale


def _label(axes: Any, place: int, result: dict[str, Any], row: dict[str, Any]) -> None:
    """What stands behind a bar: its time, and how it compares with ours."""
    pairs = [pair for pair in result["comparisons"] if pair["against"] == row["name"]]
    words, colour, weight = f"{row['milliseconds']['step']['median']:.1f} ms", _INK, "normal"
    if pairs:
        pair = pairs[0]
        words += f"   {pair['ratio']:.2f}x [{pair['low']:.2f}, {pair['high']:.2f}]"
        if pair["verdict"] == "ours SLOWER":
            words, colour, weight = f"{words}  we lose", _LOSS, "bold"
    axes.annotate(
        words, (row["milliseconds"]["step"]["high"], place), xytext=(6, 0), textcoords="offset points",
        va="center", fontsize=8.5, color=colour, fontweight=weight,
    )  # fmt: skip


def _memory_panel(axes: Any, result: dict[str, Any]) -> None:
    rows = _ran(result)
    values = [(row["peak_bytes"] or 0) / 1e6 for row in rows]
    kept = [(row["kept_bytes"] or 0) / 1e6 for row in rows]
    for place, row in enumerate(rows):
        axes.barh(place, values[place], height=0.62, color=_colour(row), alpha=0.42, linewidth=0)
        axes.barh(place, kept[place], height=0.62, color=_colour(row), linewidth=0)
        words = f"{values[place]:.3g}" + (f" ({kept[place]:.3g} kept)" if kept[place] else "")
        axes.annotate(
            words, (max(values[place], kept[place]), place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=_INK,
        )  # fmt: skip
    axes.set_xlim(0, max([*values, *kept, 1e-3]) * 1.6)
    _dress(axes, rows, "peak memory of a step", "MB (dark: kept for backward)" if any(kept) else "MB")
    axes.set_yticks(range(len(rows)), [""] * len(rows))


def _dress(axes: Any, rows: list[dict[str, Any]], title: str, unit: str) -> None:
    axes.set_title(title, color=_INK, fontsize=10.5, loc="left", fontweight="bold")
    axes.set_xlabel(unit, fontsize=8.5, color=_INK)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0, labelsize=9, colors=_INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
