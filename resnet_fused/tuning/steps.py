"""Whole training steps of a private copy of the user's model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import winners
from ..fuse import fuse
from ..modules import Fused
from .candidates import Table
from .race import Outcome, Timer, race

LEAST_STEPS = 3


def private_copy(model: nn.Module, memory: str | None, engine: str | None) -> nn.Module:
    """A fused copy in training mode, of what a wrapper holds; a model in eval mode is put in training mode.

    Raises:
        ValueError: unknown ``memory`` or ``engine``.  TypeError, RuntimeError: the model cannot be copied.
    """
    model = _unwrapped(model)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.grad = None
    if memory is not None or engine is not None or not any(isinstance(m, Fused) for m in twin.modules()):
        fuse(twin, memory=memory or "speed", engine=engine)
    return twin if model.training else twin.train()


def _unwrapped(model: nn.Module) -> nn.Module:
    """What `torch.compile` or a data-parallel wrapper holds."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while hasattr(model, "_orig_mod") or isinstance(model, wrappers):
        model = model.module if isinstance(model, wrappers) else model._orig_mod  # type: ignore[assignment]
    return model


def _floats(value: Any) -> Iterator[Tensor]:
    """The tensors of an output that a gradient can flow into."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _floats(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _floats(inner)


class Step:
    """Forward and backward of every parameter of a model on one sample, from the mean of the output."""

    def __init__(self, model: nn.Module, sample: tuple[Any, ...]) -> None:
        self.model, self.sample = model, sample

    def __call__(self) -> None:
        """One step; its gradients are dropped."""
        with torch.enable_grad():
            loss = sum(t.float().mean() for t in _floats(self.model(*self.sample)))
            if isinstance(loss, Tensor):
                loss.backward()
        self.model.zero_grad(set_to_none=True)


def race_steps(step: Step, before: Table, after: Table, timer: Timer, until: float) -> Outcome | None:
    """Steps under both tables in turns; at least `LEAST_STEPS` rounds, whatever the time."""

    def under(table: Table) -> Any:
        def run() -> None:
            with winners.using(table):
                step()

        return run

    runs = {"before": under(before), "tuned": under(after)}
    outcome = race(runs, timer, until)
    return outcome or race(runs, timer, float("inf"), most=LEAST_STEPS, least=LEAST_STEPS, warm_ups=0)
