"""Layer responses as a PNG, after the paper's Fig. 7: in network order above, ranked below."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from .responses import LayerResponses

_RESIDUAL = ("#d1495b", "#00798c", "#edae49", "#3d5a80", "#6a4c93")
_PLAIN = ("#8d96a3", "#5c6470", "#b7bdc6", "#2b2d42")
_INK, _GRID = "#2b2d42", "#e4e6eb"


class Curve(NamedTuple):
    """One net: its name, whether it has no shortcuts (drawn dashed, in grey), its responses."""

    label: str
    plain: bool
    responses: LayerResponses


def draw(curves: Sequence[Curve], title: str) -> bytes:
    """The picture, as the bytes of a PNG file; needs matplotlib."""
    # The object interface: no global figure, no display, no backend of the user's touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 6.4), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    panels = ((1, "layer index (original order)", False), (2, "layer index (ranked)", True))
    for number, label, ranked in panels:
        axes = figure.add_subplot(2, 1, number)
        used = {False: 0, True: 0}
        for curve in curves:
            responses = curve.responses.sorted() if ranked else curve.responses
            colours = _PLAIN if curve.plain else _RESIDUAL
            colour = colours[used[curve.plain] % len(colours)]
            used[curve.plain] += 1
            axes.plot(
                range(1, len(responses) + 1), responses.std, color=colour, label=curve.label, linewidth=1.8,
                linestyle=(0, (4, 2)) if curve.plain else "-", marker="o", markersize=2.5,
            )  # fmt: skip
        axes.set(xlabel=label, ylabel="std")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if number == 1:
            axes.legend(frameon=False, ncols=2, fontsize=9)
    figure.suptitle(title, fontsize=12.5, fontweight="bold", color=_INK, x=0.02, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
