"""Training step and inference of whole nets on the CPU, float32, as `resnet-fused bench` times them.

python -m pytest benchmarks/test_bench_models.py --benchmark-quiet --benchmark-json=benchmarks/results/models.json
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.conftest import ROWS, line, medians_of
from resnet_fused.benching import report
from resnet_fused.benching.session import Session, Settings
from resnet_fused.benching.spread import Comparison


@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.quick), "resnet50"])
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
