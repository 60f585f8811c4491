"""Shared by the tests of tuning: an empty table, a folder of one's own, and nets with shortcuts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import plan, projected, projection, winners
from resnet_fused.eager_blocks import BasicBlock
from resnet_fused.engines import cpu_plan, cpu_site
from resnet_fused.tuning import Timer
from resnet_fused.tuning.steps import Step
from resnet_fused.winners import store
from tests.harness import randomise

CPU = projection.unavailable(torch.device("cpu"), torch.float32)
needs_ops = pytest.mark.skipif(CPU is not None, reason=f"the projection ops cannot run: {CPU}")


@pytest.fixture(autouse=True)
def no_winners(monkeypatch, tmp_path):
    """An empty table, no file looked for, a folder of our own, and no shortcut so small that the rules keep it.

    On the CPU shortcuts alone are decided: the sites of the main path are the library's.
    """
    monkeypatch.setattr(cpu_plan, "impossible", lambda shape: "not raced here")
    monkeypatch.setattr(plan, "_refused", {})
    monkeypatch.setattr(plan, "SMALL_PRODUCT", 0)
    monkeypatch.setattr(store, "_warned", set())
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(winners.SWITCH, raising=False)
    forget()
    cpu_plan._decide.cache_clear()
    yield
    forget()
    cpu_plan._decide.cache_clear()


def need_a_traced_chain():
    """Skip where torch.compile sees the stock modules instead of the chain."""
    exporting = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager", fullgraph=True)
    if exporting(torch.zeros(1)):
        pytest.skip("this torch's compiler takes is_exporting() for true, so that blocks are compiled as written")


def forget():
    """As in a fresh process."""
    winners.replace({}, [])
    winners._tried.clear()


def cpu_name():
    return winners.device_name(torch.device("cpu"))


def shortcut_block(c: int = 12, k: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return randomise(BasicBlock(c, k, 2, nn.Sequential(nn.Conv2d(c, k, 1, 2, bias=False), nn.BatchNorm2d(k))))


def images(c: int = 12) -> Tensor:
    return torch.randn(2, c, 7, 9, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )


class Clock:
    """Seconds that pass only while a shortcut runs: ``extension`` and ``library`` say how many, forward alone.

    ``tuned``: further seconds of a whole step while there are winners.
    """

    def __init__(self, extension: float, library: float, tuned: float = 0.0) -> None:
        self.now, self.seconds, self.tuned = 0.0, {"extension": extension, "library": library}, tuned
        self.limit = float("inf")

    def __call__(self) -> float:
        return self.now

    def timer(self) -> Timer:
        return Timer(torch.device("cpu"), self)

    def pass_(self, name: str) -> None:
        self.now += self.seconds[name]
        if self.now >= self.limit:
            self.limit = float("inf")
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def running(self, wrong: Callable[[Tensor], Tensor] | None = None) -> Iterator[Clock]:
        """Let the clock go in the block; ``wrong`` is done to what the library's convolution makes of a shortcut."""
        own, vendor, step = projected.site_forward, cpu_site.site_forward, Step.__call__

        def extension(engine, call, *rest):
            self.pass_("extension")
            return own(engine, call, *rest)

        def by_library(engine, call, *rest):
            made = vendor(engine, call, *rest)
            if not call.projection:
                return made
            self.pass_("library")
            return made if wrong is None else made._replace(y=wrong(made.y))

        def whole(stepping):
            self.now += self.tuned if winners.table() else 0.0
            step(stepping)

        with (
            mock.patch.object(projected, "site_forward", extension),
            mock.patch.object(cpu_site, "site_forward", by_library),
            mock.patch.object(Step, "__call__", whole),
        ):
            yield self
