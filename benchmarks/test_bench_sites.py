"""Every convolution of a net's training step on the CPU as its site runs it, ours beside the library's, in GFLOP/s.

Forward, dgrad and wgrad of each site with the batch norm and ReLU around it: what `tune` races. A candidate that breaks
the numerics law is not timed. ``peak`` is `torch.mm` of two 2048 x 2048 matrices, in turns with them.

python -m pytest benchmarks/test_bench_sites.py --threads 2 --rounds 9
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import OURS
from benchmarks.conftest import ROWS
from resnet_fused import fuse, plan, winners
from resnet_fused.benching.race import Race, Step, whole
from resnet_fused.engines import cpu, cpu_plan
from resnet_fused.train.models import build_model
from resnet_fused.tuning.candidates import WORK, Table, faults, variant
from resnet_fused.tuning.sites import Inputs, SiteProblem, collect, make_inputs
from resnet_fused.tuning.steps import Step as TrainingStep

pytestmark = pytest.mark.skipif(cpu.load() is not None, reason=str(cpu.load()))

NETS = {"resnet18": None, "resnet50": None, "cifar-20": (128, 3, 32, 32)}
SIDE = 2048


def problems(name: str, batch: int, image: int) -> list[SiteProblem]:
    torch.manual_seed(0)
    model = fuse(build_model(name).to(memory_format=torch.channels_last), engine="cpu").train()
    shape = NETS[name] or (batch, 3, image, image)
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return [p for p in collect(TrainingStep(model, (images,))) if cpu_plan.impossible(p.shape) is None]


@pytest.mark.parametrize("part", ["fwd", "dgrad", "wgrad"])
@pytest.mark.parametrize("name", NETS)
def test_sites(name: str, part: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
    option, rows = request.config.option, request.config.stash[ROWS]
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    steps: dict[str, Step] = {}
    work: dict[str, float] = {"peak": 2.0 * SIDE**3}
    for problem in problems(name, option.batch, option.image):
        prepared = [make_inputs(use, problem.key, torch.device("cpu")) for use in problem.uses[:1]]
        if part == "dgrad" and not prepared[0].needs[0]:
            continue
        tried = {OURS: variant(problem, plan.OWN, {}), "library": variant(problem, plan.LIBRARY, {})}
        assert not faults(list(tried.values()), problem, prepared, part)
        work[str(problem)] = 2.0 * problem.cost / problem.count
        for label, candidate in tried.items():
            steps[f"{label}: {problem}"] = whole(_run(candidate.table, prepared[0], part))
    steps["peak"] = whole(lambda: torch.mm(left, right))
    race = Race(steps)
    race.warm_up(option.warm_up)
    benchmark.pedantic(race.round, rounds=option.rounds, iterations=1, warmup_rounds=0)
    assert not race.failed, race.failed
    rates = {label: _rate(race, label, work[label.partition(": ")[2] or label]) for label in steps}
    benchmark.extra_info.update(gflops=rates, dtype="fp32")
    for problem in (key for key in work if key != "peak"):
        ours, library = rates[f"{OURS}: {problem}"], rates[f"library: {problem}"]
        found = race.compare(f"{OURS}: {problem}", f"library: {problem}")
        share = 100 * ours / rates["peak"]
        words = f"{name} {part} {problem}: {ours:.0f} GFLOP/s, {share:.0f} % of mm's {rates['peak']:.0f}"
        rows.append(
            (
                found.ratio,
                f"{found.ratio:.2f}x [{found.low:.2f}, {found.high:.2f}]".ljust(24) + f"{words}; library {library:.0f}",
            )
        )


def _rate(race: Race, label: str, flops: float) -> float:
    """GFLOP/s by the median time."""
    return flops / race.figures(label)["milliseconds"]["step"]["median"] / 1e6


def _run(table: Table, inputs: Inputs, part: str) -> Any:
    def run() -> None:
        with winners.using(table):
            WORK[part](inputs)

    return run
