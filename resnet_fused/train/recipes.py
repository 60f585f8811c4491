"""Training recipes: a small table, and the learning-rate schedule they share.

All train by SGD with momentum on cross-entropy. The schedule is a function of the iteration alone,
but for one rule that watches the training error: He et al. 2015, section 4.2, start the 110-layer
net at a learning rate of 0.01 until the training error is below 80%.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from .errors import UserError

# Weight of one batch in the running training error: an average over about 50 batches, so that a
# lucky batch does not end the warm-up.
ERROR_WEIGHT = 0.02


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Args:
        batch_size: images per iteration.  lr: peak learning rate.  iterations: length of the run.
        decay: ``step`` divides the rate by 10 at each of ``milestones``; ``cosine`` goes to zero.
        milestones: fractions of the run, so they scale with ``--iterations``.
        warmup_iterations: linear warm-up from zero; at most a tenth of the run.
        warmup_lr, warmup_error: hold ``warmup_lr`` until the running training error, a fraction, is
            below ``warmup_error``.
        augment: pad and random crop, and a random mirror where the data allows it.
        pixel_mean: subtract the mean image, and no more; else each channel's mean, over its deviation.
        scales: augment by scale, crop and colour instead (`augment`): the shorter side's bounds for a crop of 224.
    """

    summary: str
    batch_size: int
    lr: float
    iterations: int
    decay: Literal["step", "cosine"] = "step"
    milestones: tuple[float, ...] = ()
    warmup_iterations: int = 0
    warmup_lr: float = 0.0
    warmup_error: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: bool = True
    pixel_mean: bool = False
    scales: tuple[int, int] | None = None


RECIPES: dict[str, Recipe] = {
    "quick": Recipe("a few minutes to a few tens: cosine to zero", 128, 0.1, 2000, "cosine", warmup_iterations=100),
    "demo": Recipe(
        "what `make demo` runs; a rate at which rounding is not amplified",
        128,
        0.03,
        300,
        "cosine",
        warmup_iterations=20,
    ),
    "he2015-cifar": Recipe("He et al. 2015, section 4.2", 128, 0.1, 64_000, milestones=(0.5, 0.75), pixel_mean=True),
    "he2015-cifar-110": Recipe(
        "the same for 110 layers: 0.01 until the training error is below 80%",
        128,
        0.1,
        64_000,
        milestones=(0.5, 0.75),
        warmup_lr=0.01,
        warmup_error=0.8,
        pixel_mean=True,
    ),
    "he2015-imagenet": Recipe(
        "He et al. 2015, section 3.4, the rate lowered at 30, 60 and 90 of 120 epochs for its plateaus",
        256,
        0.1,
        600_000,
        milestones=(0.25, 0.5, 0.75),
        scales=(256, 480),
    ),
    "imagenet-90": Recipe("90 epochs of 1.28 million images", 256, 0.1, 450_000, milestones=(1 / 3, 2 / 3)),
}

IMAGENET = ("imagenet-90", "he2015-imagenet")  # recipes of nets for large images
DEEP = {"he2015-cifar": "he2015-cifar-110"}  # what a recipe is for nets of 110 layers or more


def find_recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        UserError: there is none.
    """
    if name not in RECIPES:
        raise UserError(f"train: --recipe: expected one of {', '.join(RECIPES)}; got {name!r}")
    return RECIPES[name]


class Schedule:
    """The learning rate of a run.

    Args:
        recipe: the table's row.  lr: peak learning rate.  iterations: length of the run.
    """

    def __init__(self, recipe: Recipe, lr: float, iterations: int) -> None:
        self.recipe = recipe
        self.peak = lr
        self.iterations = iterations
        self.warmup_iterations = min(recipe.warmup_iterations, iterations // 10)
        self.held = recipe.warmup_error is not None
        self.error = 1.0

    def lr(self, iteration: int) -> float:
        """The learning rate of step ``iteration``, counted from 0."""
        if self.held:
            return self.recipe.warmup_lr
        if iteration < self.warmup_iterations:
            return self.peak * (iteration + 1) / self.warmup_iterations
        done = iteration / self.iterations
        if self.recipe.decay == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * done))
        return self.peak * 0.1 ** sum(done >= milestone for milestone in self.recipe.milestones)

    def observe(self, error: float) -> None:
        """Take in a batch's training error, a fraction; may end the held warm-up."""
        self.error += ERROR_WEIGHT * (error - self.error)
        if self.recipe.warmup_error is not None and self.error < self.recipe.warmup_error:
            self.held = False

    def state_dict(self) -> dict[str, float | bool]:
        """What must be kept to go on exactly."""
        return {"held": self.held, "error": self.error}

    def load_state_dict(self, state: dict[str, float | bool]) -> None:
        """Go on from `state_dict`."""
        self.held = bool(state["held"])
        self.error = float(state["error"])
