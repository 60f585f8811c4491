"""Host time of a block on the CPU, one thread: images so small that what is timed is Python, dispatch and set-up.

Ours against eager channels_last, in turns, forward alone and forward + backward. Where eager takes less time
than ours, the ratio of the table is below 1.

python -m pytest benchmarks/test_bench_overhead.py --benchmark-quiet --rounds 101
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from benchmarks.cases import contestants, prove
from benchmarks.test_bench_blocks import projection
from resnet_fused.benching.contest import GradientStep
from resnet_fused.benching.race import Mark, Step
from resnet_fused.eager import BasicBlock, Bottleneck
from resnet_fused.resnet import BUILDERS

STEPS_IN_A_ROUND = 10

# the model and its input's channels and size; batch 2
CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "bottleneck 16-4-16": (lambda: Bottleneck(16, 4), 16, 2),
    "bottleneck 8-4-16, projection": (lambda: Bottleneck(8, 4, 1, projection(8, 16, 1)), 8, 2),
    "basic 16": (lambda: BasicBlock(16, 16), 16, 2),
    "basic 8-16, stride 2, projection": (lambda: BasicBlock(8, 16, 2, projection(8, 16, 2)), 8, 4),
    "cifar-20": (lambda: BUILDERS["cifar-20"](fused=False), 3, 8),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(phase: str) -> None:
    """A step in a round has no phases of its own."""


def repeated(step: GradientStep, times: int, backward: bool) -> Step:
    """So many steps as one; without the backward the forward's graph dies at once."""

    def run(mark: Mark) -> None:
        for _ in range(times):
            if backward:
                step(quiet)
            else:
                step.model(step.x)

    return run


@pytest.mark.quick
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("name", CASES)
def test_overhead(name, direction, one_thread, benchmark, turns):
    torch.manual_seed(0)
    build, channels, size = CASES[name]
    stock, shape = build(), (2, channels, size, size)
    prove(stock, shape)
    x = torch.randn(shape, requires_grad=channels > 3)
    made = contestants(stock, x, ("nhwc",))
    times = 1 if name == "cifar-20" else STEPS_IN_A_ROUND
    steps = {label: repeated(step, times, direction != "forward") for label, step in made.items()}
    turns(f"host time, {name}, {'x'.join(map(str, shape))}, {direction}, {times} steps", steps)
    benchmark.extra_info.update(shape=list(shape), dtype="fp32", steps=times)
