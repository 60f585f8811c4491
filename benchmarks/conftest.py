"""Options, the machine's description in the JSON, and the table at the end of a benchmark run."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from benchmarks.race import Race, contestants, gate
from resnet_fused import engines

TABLES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused benchmarks")
    group.addoption("--batch", type=int, default=8, help="images in a batch (default 8)")
    group.addoption("--image", type=int, default=224, help="image size in pixels (default 224)")
    group.addoption("--rounds", type=int, default=11, help="timed rounds (default 11)")
    group.addoption("--warm-up", type=int, default=2, help="untimed rounds before (default 2)")
    group.addoption("--threads", type=int, default=0, help="intra-op threads (default: torch's)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def _processor() -> str:
    """The CPU's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or "unknown"


def _describe() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "resnet_fused": resnet_fused.__version__,
        "engine": engines.select(torch.device("cpu"), torch.float32),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["pytest", *sys.argv[1:]]),
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a host name describes nothing
    machine_info.update(_describe())


@pytest.fixture
def interleaved(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[str, nn.Module, Tensor], None]:
    """Gate a model, then time its training step against eager and compile in turns.

    The JSON's ``extra_info`` holds each contestant's row and times; pytest-benchmark's own figures are
    those of a whole round, the contestants' steps one after another.
    """
    option = request.config.getoption

    def run(title: str, stock: nn.Module, x: Tensor) -> None:
        gate(stock, tuple(x.shape))
        torch.compiler.reset()
        race = Race(contestants(stock, x))
        race.warm_up(option("--warm-up"))
        benchmark.pedantic(race.round, rounds=option("--rounds"), iterations=1, warmup_rounds=0)
        rows = race.rows()
        benchmark.extra_info.update(
            shape=list(x.shape),
            dtype="fp32",
            rows=[dataclasses.asdict(row) for row in rows],
            seconds=race.seconds,
        )
        size = "x".join(str(n) for n in x.shape)
        head = f"{title}, {size} fp32, forward + backward, {option('--rounds')} rounds in turns"
        request.config.stash[TABLES].append("\n".join([head, *(f"  {row}" for row in rows)]))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[TABLES]:
        return
    terminalreporter.section("training step, fused against the others")
    terminalreporter.write_line("median [quartiles], then its median over ours [quartiles round by round]")
    for table in config.stash[TABLES]:
        terminalreporter.write_line("")
        terminalreporter.write_line(table)
    terminalreporter.write_line("")
    terminalreporter.write_line("  ".join(f"{key} {value}" for key, value in _describe().items()))
