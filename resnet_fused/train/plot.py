"""The run's curves as a PNG."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .history import History
from .lanes import FUSED, STOCK, YARDSTICK

NAME = "curves.png"
_COLOURS = {FUSED: "#d1495b", STOCK: "#00798c", YARDSTICK: "#8d96a3"}
_INK, _GRID = "#2b2d42", "#e4e6eb"
_TINY = 1e-9  # a difference of exactly zero has no place on a log axis


def smooth(values: list[float], window: int) -> list[float]:
    """The mean of each value and the ``window - 1`` before it."""
    out, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        out.append(total / min(index + 1, window))
    return out


def _loss_panel(axes: Any, history: History) -> None:
    for name in reversed(history.lanes):
        losses = history.losses[name]
        steps = range(1, len(losses) + 1)
        line = {"color": _COLOURS[name], "label": name, "linewidth": 2.0}
        # Two curves that agree would hide one another: the fused one is drawn on top, dashed.
        dashes = {"linestyle": (0, (4, 2))} if name == FUSED and len(history.lanes) > 1 else {}
        axes.plot(steps, losses, color=_COLOURS[name], alpha=0.18, linewidth=0.8)
        axes.plot(steps, smooth(losses, max(1, len(losses) // 40)), **line, **dashes)
    axes.set(title="Training loss", ylabel="cross-entropy")
    axes.legend(frameon=False)


def _accuracy_panel(axes: Any, history: History) -> None:
    steps = [evaluation["iteration"] for evaluation in history.evaluations]
    for name in reversed(history.lanes):
        values = [100 * evaluation["accuracy"][name] for evaluation in history.evaluations]
        axes.plot(steps, values, color=_COLOURS[name], marker="o", markersize=5, linewidth=2.0, label=name)
        if values and name in (FUSED, STOCK):
            offset = (6, 6) if name == FUSED else (6, -12)
            axes.annotate(
                f"{values[-1]:.1f}", (steps[-1], values[-1]), xytext=offset, textcoords="offset points",
                color=_COLOURS[name], fontweight="bold", annotation_clip=False,
            )  # fmt: skip
    axes.set(title=f"{history.evaluated.capitalize()} accuracy", ylabel="%")


def _difference_panel(axes: Any, history: History) -> None:
    stock = history.losses[STOCK]
    for name in (YARDSTICK, FUSED):
        if name in history.lanes:
            gaps = [max(_TINY, abs(a - b)) for a, b in zip(history.losses[name], stock)]
            axes.semilogy(range(1, len(gaps) + 1), gaps, color=_COLOURS[name], linewidth=1.2, label=f"{name} - stock")
    axes.set(title="Loss difference on the same batch", ylabel="absolute")
    axes.legend(frameon=False)


def draw(history: History, title: str, lines: list[str], folder: Path) -> Path | None:
    """Draw losses, accuracies and, for a comparison, the differences; None where matplotlib is missing.

    Args:
        history: of the whole run.
        title: above the panels.
        lines: the summary, below them.
        folder: where the PNG goes.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    # The object interface: no global figure, no display, no backend of the user's touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [_loss_panel, _accuracy_panel, *([_difference_panel] if STOCK in history.lanes else [])]
    figure = Figure(figsize=(5.2 * len(panels), 5.6), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        panel(axes, history)
        axes.set_xlabel("iteration")
        axes.title.set_color(_INK)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=_INK, x=0.02, ha="left")
    figure.text(0.02, 0.02, "\n".join(lines), family="monospace", fontsize=8.5, color=_INK, va="bottom")
    figure.tight_layout(rect=(0, 0.04 + 0.032 * len(lines), 1, 0.95))
    path = folder / NAME
    figure.savefig(path)
    return path
