"""Host time of a block on the CPU, one thread: images so small that what is timed is Python, dispatch and set-up.

Ours against eager channels_last, in turns, forward alone and forward + backward. The figure of merit is at most 1.0:
ours over eager, the inverse of the table's speed-up.

python -m pytest benchmarks/test_bench_overhead.py --benchmark-quiet --rounds 101
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import TABLES
from benchmarks.race import OURS, Race, Step, gate, train_step
from benchmarks.test_bench_blocks import projection
from resnet_fused import fuse
from resnet_fused.eager import BasicBlock, Bottleneck
from resnet_fused.resnet import BUILDERS

EAGER = "eager channels_last"
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


def forward_alone(model: nn.Module, x: Tensor, _: Tensor) -> Step:
    """The forward with its graph, which dies at once."""

    def step() -> None:
        model(x)

    return step


def repeated(step: Step, times: int) -> Step:
    def run() -> None:
        for _ in range(times):
            step()

    return run


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize("name", CASES)
def test_overhead(name, direction, one_thread, benchmark, request):
    torch.manual_seed(0)
    build, channels, size = CASES[name]
    stock = build().to(memory_format=torch.channels_last)
    shape = (2, channels, size, size)
    gate(stock, shape)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_(channels > 3)
    with torch.no_grad():
        dout = torch.randn_like(copy.deepcopy(stock)(x))
    make = forward_alone if direction == "forward" else train_step
    models = {EAGER: copy.deepcopy(stock), OURS: fuse(copy.deepcopy(stock), memory="speed")}
    times = 1 if name == "cifar-20" else STEPS_IN_A_ROUND
    race = Race({label: repeated(make(model, x, dout), times) for label, model in models.items()})
    race.warm_up(request.config.getoption("--warm-up") + 3)
    rounds = request.config.getoption("--rounds")
    benchmark.pedantic(race.round, rounds=rounds, iterations=1, warmup_rounds=0)
    rows = race.rows()
    benchmark.extra_info.update(shape=list(shape), dtype="fp32", rows=[dataclasses.asdict(row) for row in rows])
    head = f"{name}, {'x'.join(map(str, shape))} fp32, {direction}, {times} steps a round, {rounds} rounds in turns"
    ratio = 1 / rows[0].speedup
    request.config.stash[TABLES].append("\n".join([f"{head}: ours / eager {ratio:.2f}", *(f"  {row}" for row in rows)]))
