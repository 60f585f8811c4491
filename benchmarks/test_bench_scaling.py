"""How the time of a ResNet-18's forward and backward grows with batch, image and threads on the CPU, ours and eager's.

A row for each size: ours against eager channels_last, and what a megapixel of images costs. Where the work grows and
its cost jumps up, a kernel has fallen off a cliff.

python -m pytest benchmarks/test_bench_scaling.py --benchmark-quiet --rounds 7
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import OURS, contestants, prove
from benchmarks.conftest import ROWS
from resnet_fused.benching.race import Race, Step
from resnet_fused.train.models import build_model

# images and their size in pixels
SERIES = {
    "batch": [(batch, 64) for batch in (1, 2, 4, 8, 16, 32, 64)],
    "image": [(2, side) for side in (32, 64, 112, 224, 448)],
}
PROVEN = 2 * 224 * 224  # pixels; a larger case is the same code on more of them


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("series", SERIES)
def test_scaling(series: str, threads: int, benchmark: Any, request: pytest.FixtureRequest) -> None:
    option, rows = request.config.option, request.config.stash[ROWS]
    torch.manual_seed(0)
    stock = build_model("resnet18").train()
    steps: dict[str, Step] = {}
    for batch, side in SERIES[series]:
        shape = (batch, 3, side, side)
        if batch * side * side <= PROVEN:
            prove(stock, shape)
        made = contestants(stock, torch.randn(shape), ("nhwc",))
        steps |= {f"{label}: {batch} x {side}": step for label, step in made.items()}
    race = Race(steps)
    race.warm_up(option.warm_up)
    benchmark.pedantic(race.round, rounds=option.rounds, iterations=1, warmup_rounds=0)
    assert not race.failed, race.failed
    costs = {label: _milliseconds(race, label) for label in steps}
    benchmark.extra_info.update(milliseconds=costs, threads=threads, dtype="fp32")
    eager = next(label.partition(": ")[0] for label in steps if not label.startswith(OURS))
    for batch, side in SERIES[series]:
        size, megapixels = f"{batch} x {side}", batch * side * side / 1e6
        found = race.compare(f"{OURS}: {size}", f"{eager}: {size}")
        each = {label: costs[f"{label}: {size}"] / megapixels for label in (OURS, eager)}
        words = ", ".join(f"{label} {cost:.0f}" for label, cost in each.items())
        order = f"{series} of {threads} threads, {batch:2} images of {side:3} px"
        rows.append(
            (
                found.ratio,
                f"{found.ratio:.2f}x [{found.low:.2f}, {found.high:.2f}]".ljust(24)
                + f"{order}: {costs[f'{OURS}: {size}']:.1f} ms; per megapixel {words} ms",
            )
        )


def _milliseconds(race: Race, label: str) -> float:
    return race.figures(label)["milliseconds"]["step"]["median"]
