"""Every convolution of a net's training step on the CPU as its site runs it, ours beside the library's, in GFLOP/s.

Forward, dgrad and wgrad of each site with the batch norm and ReLU around it: what `tune` races. A candidate that breaks
the numerics law is not timed. In turns with them: ``peak``, `torch.mm` of two 2048 x 2048 matrices, and ``copy`` of
64 MiB. A part's roof is the least time that these two rates allow: of the products, of which Winograd needs 4 of 9, or
of the bytes of every activation and weight that must be read or written once.

python -m pytest benchmarks/test_bench_sites.py --threads 2 --rounds 9
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
COPIED = 64 << 20
WINOGRAD = 4 / 9  # of the products of a 3x3 of stride 1


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
    source, target = (torch.zeros(COPIED // 4) for _ in range(2))
    steps: dict[str, Step] = {}
    shapes: dict[str, plan.ConvShape] = {}
    work: dict[str, float] = {"peak": 2.0 * SIDE**3}
    for problem in problems(name, option.batch, option.image):
        prepared = [make_inputs(use, problem.key, torch.device("cpu")) for use in problem.uses[:1]]
        if part == "dgrad" and not prepared[0].needs[0]:
            continue
        tried = {OURS: variant(problem, plan.OWN, {}), "library": variant(problem, plan.LIBRARY, {})}
        assert not faults(list(tried.values()), problem, prepared, part)
        work[str(problem)] = 2.0 * problem.cost / problem.count
        shapes[str(problem)] = problem.shape
        for label, candidate in tried.items():
            steps[f"{label}: {problem}"] = whole(_run(candidate.table, prepared[0], part))
    steps["peak"] = whole(lambda: torch.mm(left, right))
    steps["copy"] = whole(lambda: target.copy_(source))
    race = Race(steps)
    race.warm_up(option.warm_up)
    benchmark.pedantic(race.round, rounds=option.rounds, iterations=1, warmup_rounds=0)
    assert not race.failed, race.failed
    times = {label: _milliseconds(race, label) for label in steps}
    rates = {label: work[label.partition(": ")[2] or label] / times[label] / 1e6 for label in steps if label != "copy"}
    bandwidth = 2 * COPIED / times["copy"] / 1e6
    roofs = {}
    for problem, shape in shapes.items():
        products = work[problem] * (WINOGRAD if _by_patches(shape) else 1) / rates["peak"] / 1e6
        roofs[problem] = max(products, _bytes(shape, part) / bandwidth / 1e6)
        found = race.compare(f"{OURS}: {problem}", f"library: {problem}")
        share = roofs[problem] / times[f"{OURS}: {problem}"]
        bound = "products" if products >= roofs[problem] else "bytes"
        ratio = f"{found.ratio:.2f}x [{found.low:.2f}, {found.high:.2f}]".ljust(24)
        ours, library = rates[f"{OURS}: {problem}"], rates[f"library: {problem}"]
        words = f"{name} {part} {problem}: {ours:.0f} GFLOP/s, {100 * share:.0f} % of the roof of its {bound}"
        rows.append((found.ratio, f"{ratio}{words}; library {library:.0f}"))
    rows.extend(_by_kind(f"{name} {part}", shapes, times, roofs))
    benchmark.extra_info.update(
        gflops=rates, milliseconds=times, roof_milliseconds=roofs, gigabytes_per_second=bandwidth, dtype="fp32"
    )


def _by_kind(
    title: str, shapes: dict[str, plan.ConvShape], times: dict[str, float], roofs: dict[str, float]
) -> Iterator[tuple[float, str]]:
    """A row for each filter and stride, of every shape once."""
    kind = {problem: f"{shape.filter[0]}x{shape.filter[1]}/{shape.stride[0]}" for problem, shape in shapes.items()}
    for own in sorted(set(kind.values())):
        of = [problem for problem in shapes if kind[problem] == own]
        ours, library = (sum(times[f"{label}: {problem}"] for problem in of) for label in (OURS, "library"))
        share = 100 * sum(roofs[problem] for problem in of) / ours
        words = f"{title}, all {len(of)} of {own}: {ours:.1f} ms, {share:.0f} % of the roof; library {library:.1f} ms"
        yield library / ours, f"{library / ours:.2f}x".ljust(24) + words


def _by_patches(shape: plan.ConvShape) -> bool:
    return shape.filter == (3, 3) and shape.stride == (1, 1) and min(shape.c, shape.k) >= 16


def _bytes(shape: plan.ConvShape, part: str) -> int:
    """Of the tensors that must be read or written once: of the batch norm's backward, ``g`` and ``y``."""
    source, made = shape.n * shape.c * shape.h * shape.w, shape.n * shape.k * math.prod(shape.out)
    weight = shape.k * shape.c * shape.filter[0] * shape.filter[1]
    elements = {"fwd": source + made, "dgrad": 2 * made + 2 * source, "wgrad": 2 * made + source}[part]
    return 4 * (elements + weight)


def _milliseconds(race: Race, label: str) -> float:
    return race.figures(label)["milliseconds"]["step"]["median"]


def _run(table: Table, inputs: Inputs, part: str) -> Any:
    def run() -> None:
        with winners.using(table):
            WORK[part](inputs)

    return run
