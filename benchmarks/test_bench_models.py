"""Training step and inference of whole nets on the CPU, float32, as `resnet-fused bench` times them.

python -m pytest benchmarks/test_bench_models.py --benchmark-quiet --benchmark-json=benchmarks/results/models.json
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cases import OURS
from benchmarks.conftest import ROWS, Turns, line, medians_of
from resnet_fused import fold, fuse
from resnet_fused.benching import report
from resnet_fused.benching.baselines import BASELINES
from resnet_fused.benching.contest import Inference
from resnet_fused.benching.session import Session, Settings
from resnet_fused.benching.spread import Comparison
from resnet_fused.checking import check, exercise
from resnet_fused.train.models import build_model

NAMES = [pytest.param("resnet18", marks=pytest.mark.quick), "resnet50"]


@pytest.mark.parametrize("name", NAMES)
def test_model(name: str, benchmark: Any, request: pytest.FixtureRequest, baselines: tuple[str, ...]) -> None:
    option = request.config.option
    sizes = {key: getattr(option, key) for key in ("batch", "image", "rounds", "warm_up", "threads")}
    settings = Settings(models=(name,), baselines=baselines, mode=("train", "infer"), **sizes)
    session = Session(settings, say=lambda line: None)
    benchmark.pedantic(session.run, rounds=1, iterations=1)
    if session.interrupted:
        raise KeyboardInterrupt
    assert session.exit_code() == 0, report.failures(session.document(""))
    benchmark.extra_info["results"] = session.results
    for result in session.results:
        rows = [row for row in result["contestants"] if not row["failed"]]
        times = {row["label"]: medians_of(row["milliseconds"]) for row in rows}
        peaks = {row["label"]: row["peak_bytes"] for row in rows if row["peak_bytes"] is not None}
        title = f"{name} {result['mode']}, {option.batch}x3x{option.image}x{option.image}"
        for pair in result["comparisons"]:
            names = {side: report.by_name(result)[pair[side]]["label"] for side in ("ours", "against")}
            found = Comparison(**{key: value for key, value in {**pair, **names}.items() if key != "verdict"})
            request.config.stash[ROWS].append((found.ratio, line(title, found, times, peaks)))


@pytest.mark.parametrize("name", NAMES)
def test_folded(
    name: str, turns: Turns, benchmark: Any, request: pytest.FixtureRequest, baselines: tuple[str, ...]
) -> None:
    """Inference of a folded net beside the fused one, the baselines, and torch.compile with frozen parameters."""
    option = request.config.option
    torch.manual_seed(0)
    stock = build_model(name).eval()
    shape = (option.batch, 3, option.image, option.image)
    telling = exercise(copy.deepcopy(stock), 0).eval()
    proof = check(fold(copy.deepcopy(telling)), telling, shape=(1, *shape[1:]), dtype="fp32")
    assert proof.passed, f"not timed, because not correct:\n{proof}"
    torch.compiler.reset()
    images = torch.randn(shape)

    def step(model: nn.Module, layout: torch.memory_format = torch.channels_last) -> Inference:
        return Inference(model, images.contiguous(memory_format=layout))

    def own(layout: torch.memory_format = torch.channels_last) -> nn.Module:
        return copy.deepcopy(stock).to(memory_format=layout)

    steps = {OURS: step(fold(own())), "fused, not folded": step(fuse(own()))}
    for baseline in (BASELINES[each] for each in baselines):
        steps[baseline.label] = step(baseline.build(own(baseline.memory_format)), baseline.memory_format)
    if "compile" in baselines:
        frozen = own()
        frozen.compile(options={"freezing": True})
        steps["compile channels_last, freezing"] = step(frozen)
    turns(f"{name} folded, inference, {'x'.join(map(str, shape))}", steps)
    benchmark.extra_info.update(shape=list(shape), dtype="fp32")
