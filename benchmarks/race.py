"""Training steps timed in turns, so that a change of the machine's mood falls on all of them alike."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet_fused import fuse
from resnet_fused.checking import check

OURS = "fused"
Step = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant after a race.

    Args:
        median_ms, low_ms, high_ms: median and quartiles of its times, ms.
        speedup: its median over ours: above 1 we are faster.
        speedup_low, speedup_high: quartiles of the same ratio taken round by round.
    """

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float

    def verdict(self) -> str:
        """Ours against this one; a difference smaller than the spread of the rounds is none."""
        if self.name == OURS:
            return ""
        if self.speedup_low > 1 and self.speedup > 1:
            return "ours faster"
        return "ours SLOWER" if self.speedup_high < 1 and self.speedup < 1 else "no clear difference"

    def __str__(self) -> str:
        return (
            f"{self.name:<22} {self.median_ms:9.2f} ms [{self.low_ms:9.2f}, {self.high_ms:9.2f}]   "
            f"{self.speedup:5.2f}x [{self.speedup_low:.2f}, {self.speedup_high:.2f}]  {self.verdict()}"
        )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value, three times itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


class Race:
    """Named steps that run once each per round, the starter changing from round to round."""

    def __init__(self, steps: dict[str, Step]) -> None:
        self.steps = steps
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}

    def warm_up(self, rounds: int) -> None:
        """Untimed rounds: compilation, first allocations."""
        for _ in range(rounds):
            for step in self.steps.values():
                step()

    def round(self) -> None:
        """Every step once, timed."""
        names = list(self.steps)
        first = len(self.seconds[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            self.steps[name]()
            self.seconds[name].append(time.perf_counter() - start)

    def rows(self) -> list[Row]:
        """One row per step, in order of entry."""
        ours = self.seconds[OURS]
        rows = []
        for name, seconds in self.seconds.items():
            low, middle, high = (1e3 * s for s in quartiles(seconds))
            ratio_low, _, ratio_high = quartiles([theirs / own for theirs, own in zip(seconds, ours)])
            speedup = statistics.median(seconds) / statistics.median(ours)
            rows.append(Row(name, middle, low, high, speedup, ratio_low, ratio_high))
        return rows


def train_step(model: nn.Module, x: Tensor, dout: Tensor) -> Step:
    """Forward and backward to every parameter, from a given gradient of the output; no optimizer."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).backward(dout)

    return step


def contestants(stock: nn.Module, x: Tensor) -> dict[str, Step]:
    """Steps of ``stock`` and of a fused copy, on CPU: eager in both layouts, compiled, fused.

    Args:
        stock: a plain float32 model in training mode; copied.
        x: the input ``(N, C, H, W)``, contiguous. Where it requires a gradient, so do its copies.
    """
    last = torch.channels_last
    with torch.no_grad():
        dout = torch.randn_like(copy.deepcopy(stock)(x))
    x_last = x.detach().contiguous(memory_format=last).requires_grad_(x.requires_grad)
    dout_last = dout.contiguous(memory_format=last) if dout.dim() == 4 else dout
    nhwc = copy.deepcopy(stock).to(memory_format=last)
    return {
        "eager NCHW": train_step(copy.deepcopy(stock), x, dout),
        "eager channels_last": train_step(copy.deepcopy(nhwc), x_last, dout_last),
        "compile channels_last": train_step(torch.compile(copy.deepcopy(nhwc)), x_last, dout_last),
        OURS: train_step(fuse(copy.deepcopy(nhwc), memory="speed"), x_last, dout_last),
    }


def gate(stock: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse to time what is not right: the numerics law on this model and shape, before any timing.

    Raises:
        AssertionError: a tensor breaks the law; the table says which.
    """
    report = check(stock, shape=shape, dtype="fp32")
    if not report.passed:
        raise AssertionError(f"not timed, because not correct:\n{report}")
