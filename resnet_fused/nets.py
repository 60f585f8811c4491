"""The class that `fuse` swaps in for a network with a stem of its own: its convolutions wait while it runs.

The network's forward runs as it was written, whatever it does; only the runs of convolution, batch norm, ReLU and
max pool found loose in it (`runs`) execute as chains (`deferred`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from .deferred import arm, disarm, is_armed, released, rests
from .limits import recomputing, switched_off, transform
from .links import Link, child
from .modules import MIXINS, Fused, notice
from .spec import ChainSpec
from .structure import BINDING, Structure, obstacle


class RunBinding(NamedTuple):
    """A `Binding` of a run; ``rests`` is what is left of it from each site on."""

    spec: ChainSpec
    memory: str
    engine: str | None
    structure: Structure
    rests: tuple[ChainSpec, ...]


class NetBinding(NamedTuple):
    """The runs of one network; lives where a block's binding does."""

    runs: tuple[RunBinding, ...]
    engine: str | None = None


class FusedNet(Fused):
    """A user's network whose loose convolutions and batch norms run as chains."""

    @classmethod
    def class_body(cls, stock: type[nn.Module]) -> dict[str, Any]:
        """A forward with the stock one's signature: tracers and trainers look at it."""

        @functools.wraps(stock.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return cls.forward(self, *args, **kwargs)

        return {"forward": forward}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward, in which the convolutions of every run wait for their batch norms."""
        binding = self.__dict__.get(BINDING)
        if not isinstance(binding, NetBinding) or switched_off() or transform() is not None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        armed: list[nn.Module] = []
        counters = _counters(self, binding) if recomputing() else []  # type: ignore[arg-type]
        for run in binding.runs:
            reason = run_obstacle(self, run)  # type: ignore[arg-type]
            if reason is None:
                armed += arm(Link(self, run.spec, run.memory, binding.engine), run.rests)  # type: ignore[arg-type]
            elif reason != ARMED:
                notice(self, reason)
        try:
            return released(super().forward(*args, **kwargs))  # type: ignore[misc]
        finally:
            disarm(armed)
            for counter, before in counters:  # the modules count their batch themselves, once too often
                counter.copy_(before)


def _counters(net: nn.Module, binding: NetBinding) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batch counters of the runs' batch norms, and copies of them."""
    norms = [child(net, site.bn) for run in binding.runs for site in run.spec.sites if site.bn]
    counters = [norm.num_batches_tracked for norm in norms if getattr(norm, "num_batches_tracked", None) is not None]
    return [(counter, counter.clone()) for counter in counters]


ARMED = "another thread runs it at this moment"
MIXINS["net"] = FusedNet


def run_obstacle(net: nn.Module, run: RunBinding) -> str | None:
    """Why a run must execute as it was written at this moment, or None."""
    reason = obstacle(net, run)  # type: ignore[arg-type]
    if reason is not None:
        return reason
    for site in run.spec.sites:
        conv, bn = child(net, site.conv), child(net, site.bn or "")
        if type(bn) is not nn.BatchNorm2d:
            return f"{site.bn} is a {type(bn).__name__}, which is fused in blocks only"
        if "forward" in conv.__dict__:
            return ARMED if is_armed(conv) else f"the forward of {site.conv} was replaced on the instance"
    return None


def bind_run(net: nn.Module, spec: ChainSpec, engine: str | None) -> RunBinding:
    """A run of ``net``, with the classes of its modules and of the containers on the way to them."""
    paths = {".".join(path.split(".")[:n]) for path in spec.paths() for n in range(1, path.count(".") + 2)}
    held: dict[str, list[tuple[str, type | None]]] = {}
    for path in sorted(paths):
        prefix, _, name = path.rpartition(".")
        held.setdefault(prefix, []).append((name, type(net.get_submodule(path))))
    structure = tuple((prefix, tuple(children), False) for prefix, children in held.items())
    return RunBinding(spec, "speed", engine, structure, rests(spec))
