"""Plain nets against residual ones of the same depths, one run each: the degradation of He et al. 2015, Fig. 1, 6."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from . import checkpoint
from .config import TrainConfig
from .data import Dataset
from .errors import UserError
from .history import History
from .lanes import FUSED
from .loop import Stop, Trainer, check_fits, complete
from .plot import smooth
from .progress import Progress
from .recipes import DEEP

FAMILIES = ("plain", "cifar")
_POINTS = 200  # of a training curve, in the JSON and in the picture
_SMOOTHING = 40  # a training curve is averaged over this share of the run
# What may differ between a run's two halves, or between a finished run and the command that finds it.
_FREE = ("data_root", "device", "threads")


class Net(NamedTuple):
    """One run's model."""

    depth: int
    plain: bool

    @property
    def name(self) -> str:
        """As ``--model`` takes it."""
        return f"{FAMILIES[0] if self.plain else FAMILIES[1]}-{self.depth}"


def nets(depths: Sequence[int]) -> list[Net]:
    """The plain and the residual net of every depth.

    Raises:
        UserError: a depth is not 6n + 2, or comes twice.
    """
    for depth in depths:
        if depth < 8 or (depth - 2) % 6 or depths.count(depth) > 1:
            given = ",".join(map(str, depths))
            raise UserError(f"degradation: --depths: expected different depths of 6n + 2 (20,56), got {given}")
    return [Net(depth, plain) for depth in depths for plain in (True, False)]


def train_net(
    net: Net, base: TrainConfig, dataset: Dataset, out: Path, stop: Stop, stream: TextIO
) -> dict[str, Any] | None:
    """Train one net in a folder of its own below ``out``, or go on there; a finished run is only read.

    Args:
        net: which.  base: the settings of all runs.  dataset: what ``base.data`` names.
        out: the folder of all runs.  stop: set by a signal.  stream: where progress is shown.

    Returns:
        The run's curves, plain types; None where a signal came first.

    Raises:
        UserError: the folder holds a run with other settings, or cannot be written to.
    """
    recipe = DEEP.get(base.recipe, base.recipe) if net.depth >= 110 else base.recipe
    config = dataclasses.replace(base, model=net.name, recipe=recipe)
    check_fits(config)
    config, folder, state = complete(config, dataset), out / net.name, None
    if (folder / checkpoint.NAME).is_file():
        state = checkpoint.load(folder)
        _check_same(TrainConfig.from_dict(state["config"]), config, folder)
        if state["iteration"] >= config.iterations:
            print(f"{net.name}: finished before", file=stream)
            history = History([FUSED])
            history.load_state_dict(state["history"])
            return curves(net, history)
    print(f"{net.name}: {config.iterations} iterations of {config.batch_size} images", file=stream)
    trainer = Trainer(config, dataset, folder, state)
    try:
        with Progress(config.iterations, trainer.iteration, stream) as progress:
            if not trainer.run(progress, stop):
                return None
    finally:
        trainer.close()
    return curves(net, trainer.history)


def _check_same(ran: TrainConfig, asked: TrainConfig, folder: Path) -> None:
    before, now = ran.to_dict(), asked.to_dict()
    other = [
        f"{name} {before[name]}, not {now[name]}" for name in now if name not in _FREE and before[name] != now[name]
    ]
    if other:
        raise UserError(f"degradation: --out: {folder} holds a run with other settings: {'; '.join(other)}")


def curves(net: Net, history: History) -> dict[str, Any]:
    """A run's error curves, shares of 1: in training, averaged over neighbouring steps, and at every evaluation."""
    errors = history.errors[FUSED]
    steps = range(len(errors))
    step = max(1, len(errors) // _POINTS)
    kept = sorted({*steps[::step], *steps[-1:]})
    averaged = smooth(errors, max(1, len(errors) // _SMOOTHING))
    return {
        "model": net.name,
        "depth": net.depth,
        "plain": net.plain,
        "training": {"iteration": [i + 1 for i in kept], "error": [averaged[i] for i in kept]},
        "evaluation": {
            "iteration": [evaluation["iteration"] for evaluation in history.evaluations],
            "error": [1 - evaluation["accuracy"][FUSED] for evaluation in history.evaluations],
        },
    }


def table(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for every run: its model, training error and evaluated error at the end."""
    rows = []
    for run in found:
        ends = [run[kind]["error"][-1] if run[kind]["error"] else float("nan") for kind in ("training", "evaluation")]
        rows.append([run["model"], *(f"{end:.2%}" for end in ends)])
    return rows


def draw(found: Sequence[dict[str, Any]], evaluated: str, title: str) -> bytes | None:
    """The picture as the bytes of a PNG, plain nets left, residual ones right; None without matplotlib.

    Args:
        found: of `curves`.  evaluated: on which images.  title: above the panels.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    # The object interface: no global figure, no display, no backend of the user's touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.8), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    depths = sorted({run["depth"] for run in found})
    panels = figure.subplots(1, 2, sharey=True)
    for axes, plain, name in zip(panels, (True, False), ("plain", "residual")):
        for run in (run for run in found if run["plain"] is plain):
            colour = _COLOURS[depths.index(run["depth"]) % len(_COLOURS)]
            _curve(axes, run, colour)
        axes.set_title(f"{name} nets", color=_INK, fontsize=11, loc="left")
        axes.set_xlabel("iteration")
        axes.set_ylim(bottom=0)
        axes.grid(color="#e4e6eb", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel(f"error, % (dashed: training, solid: {evaluated})")
    figure.suptitle(title, fontsize=12.5, fontweight="bold", color=_INK, x=0.02, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


_COLOURS, _INK = ("#edae49", "#d1495b", "#00798c", "#3d5a80", "#6a4c93"), "#2b2d42"


def _curve(axes: Any, run: dict[str, Any], colour: str) -> None:
    def percent(kind: str) -> tuple[list[int], list[float]]:
        return run[kind]["iteration"], [100 * error for error in run[kind]["error"]]

    axes.plot(*percent("training"), color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.plot(*percent("evaluation"), color=colour, linewidth=2.2, marker="o", markersize=3, label=run["model"])
