"""Options, the machine's description in the JSON, and the tables at the end of a benchmark run: losses first."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases import OURS, contestants, prove
from resnet_fused.benching import machine
from resnet_fused.benching.contest import Contestant
from resnet_fused.benching.memory import Memory, measure
from resnet_fused.benching.race import Race, Step
from resnet_fused.benching.spread import METHOD, Comparison

ROWS = pytest.StashKey[list[tuple[float, str]]]()
# What a benchmark takes by default, and with --quick.
SIZES = {"batch": (8, 4), "image": (224, 64), "rounds": (11, 7)}
Turns = Callable[[str, Mapping[str, Step]], Race]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused benchmarks")
    group.addoption("--quick", action="store_true", help="the cases marked quick alone, smaller, without torch.compile")
    group.addoption("--batch", type=int, help="images in a batch (default 8; with --quick 4)")
    group.addoption("--image", type=int, help="image size in pixels (default 224; with --quick 64)")
    group.addoption("--rounds", type=int, help="timed rounds (default 11; with --quick 7)")
    group.addoption("--warm-up", type=int, default=2, help="untimed rounds before (default 2)")
    group.addoption("--threads", type=int, default=0, help="intra-op threads (default: torch's)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of --quick")
    config.stash[ROWS] = []
    for name, values in SIZES.items():
        if getattr(config.option, name) is None:
            setattr(config.option, name, values[config.option.quick])
    if config.option.threads:
        torch.set_num_threads(config.option.threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quick:
        others = [item for item in items if item.get_closest_marker("quick") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def _describe() -> dict[str, Any]:
    command = machine.without_paths(["pytest", *sys.argv[1:]])
    return {**machine.describe(torch.device("cpu")), **machine.versions(), "date": machine.now(), "command": command}


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # what pytest-benchmark collects names the host and its builder
    machine_info.update(_describe(), method=METHOD)


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for name in ("project", "branch"):  # the folder's and the developer's own names
        commit_info.pop(name, None)


@pytest.fixture
def baselines(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Compiling takes longer than a quick run may."""
    return ("eager", "nhwc") if request.config.option.quick else ("eager", "nhwc", "compile")


def medians_of(milliseconds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The step's median and its phases'."""
    return {phase: spread["median"] for phase, spread in milliseconds.items()}


def line(
    title: str, found: Comparison, milliseconds: Mapping[str, Mapping[str, float]], peaks: Mapping[str, int]
) -> str:
    """A comparison in one line: ratio, interval, verdict, then medians in ms with their phases, and peak memory."""

    def words(name: str) -> str:
        times = milliseconds[name]
        phases = " + ".join(f"{value:.2f}" for phase, value in times.items() if phase != "step")
        peak = f", {peaks[name] / 1e6:.1f} MB" if name in peaks else ""
        return f"{times['step']:.2f}" + (f" ({phases})" if len(times) > 2 else "") + peak

    return f"{found}".ljust(44) + f"{title}: {words(found.ours)} against {found.against} {words(found.against)}"


@pytest.fixture
def turns(request: pytest.FixtureRequest, benchmark: Any) -> Turns:
    """Time steps in turns, ours among them; ``extra_info`` of the JSON gets everyone's figures.

    Steps that are `Contestant` have their memory counted too. pytest-benchmark's own figures are those of a
    whole round, the contestants' steps one after another.
    """
    option, rows = request.config.option, request.config.stash[ROWS]

    def run(title: str, steps: Mapping[str, Step]) -> Race:
        race = Race(steps)
        race.warm_up(option.warm_up)
        memory: dict[str, Memory] = {}
        for name, step in list(race.steps.items()):
            if isinstance(step, Contestant):
                race.attempt(name, lambda step: memory.update({name: measure(step)}))  # noqa: B023
        benchmark.pedantic(race.round, rounds=option.rounds, iterations=1, warmup_rounds=0)
        assert OURS not in race.failed, f"ours did not run: {race.failed[OURS]}"
        rows.extend((0.0, f"did not run: {title}: {name}: {reason}") for name, reason in race.failed.items())
        figures = {name: race.figures(name) for name in race.finished()}
        medians = {name: medians_of(found["milliseconds"]) for name, found in figures.items()}
        peaks = {name: found.peak for name, found in memory.items() if found.peak is not None}
        for name in race.finished()[1:]:
            found = race.compare(OURS, name)
            rows.append((found.ratio, line(title, found, medians, peaks)))
            figures[name]["comparison"] = {**dataclasses.asdict(found), "verdict": found.verdict}
        for name, found in memory.items():
            figures[name]["memory_bytes"] = found._asdict()
        benchmark.extra_info.update(failed=race.failed, contestants=figures)
        return race

    return run


@pytest.fixture
def blocks(turns: Turns, benchmark: Any) -> Callable[[str, nn.Module, Tensor, tuple[str, ...]], None]:
    """Prove a module, then time its forward and backward against the baselines."""

    def run(title: str, stock: nn.Module, x: Tensor, baselines: tuple[str, ...]) -> None:
        prove(stock, tuple(x.shape))
        torch.compiler.reset()
        turns(f"{title}, {'x'.join(map(str, x.shape))}", contestants(stock, x, baselines))
        benchmark.extra_info.update(shape=list(x.shape), dtype="fp32")

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[ROWS]:
        return
    terminalreporter.section("ours against the others, where we lose first")
    terminalreporter.write_line(
        "theirs / ours, median over the rounds [its interval]; median ms (forward + backward + optimizer), peak memory"
    )
    for _, line in sorted(config.stash[ROWS]):
        terminalreporter.write_line(line)
    terminalreporter.write_line("  ".join(f"{key} {value}" for key, value in _describe().items()))
