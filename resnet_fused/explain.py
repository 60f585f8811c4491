"""What runs, and why: one record for every block of a model, and for given images one for every site."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import engines, plan, synchronise
from .chain import recomputes
from .engines import cpu_plan
from .fuse import REFUSAL, loose_runs
from .links import child
from .modules import Fused, FusedBlock, FusedStage, FusedTrunk
from .nets import FusedNet, run_obstacle
from .recognise import Refusal, find_chains
from .remarks import remarks
from .siteplan import SitePlan, shape_of_conv, site_plans
from .spec import ChainSpec
from .structure import BINDING, obstacle, stands_alone

_MB, _GIGA, _MS = 1e6, 1e9, 1e3
_SOME_PIXELS = 64  # each way: more than the CPU engine runs as one small product


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How a fused block runs: the engine, the convolutions' variant, the memory mode and the extent."""

    engine: str
    variant: str
    memory: str
    extent: str


@dataclasses.dataclass(frozen=True)
class BlockRecord:
    """One block: its name in the model, whether it runs fused, the reason in words, and the plan."""

    name: str
    kind: str
    fused: bool
    reason: str
    plan: BlockPlan | None


@dataclasses.dataclass(frozen=True)
class SiteRecord:
    """One site of a training step: its plan, what it costs, and what bounds its time.

    Args:
        moved: bytes read and written, forward and backward.  kept: bytes of its tensors kept for the backward.
        flops: a multiply-add is two.  bound: ``memory`` or ``compute``.  seconds: the floor that follows, modelled.
            Both are None where the device's rates are not known.
    """

    plan: SitePlan
    moved: float
    kept: int
    flops: float
    bound: str | None
    seconds: float | None

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        s = self.plan.shape
        conv = f"{s.filter[0]}x{s.filter[1]}/{s.stride[0]} {s.c}->{s.k}" + (f" g{s.groups}" if s.groups > 1 else "")
        numbers = (f"{self.moved / _MB:.1f}", f"{self.kept / _MB:.1f}", f"{self.flops / _GIGA:.2f}")
        bound = "-" if self.seconds is None else f"{self.bound} {self.seconds * _MS:.2f} ms"
        shape = f"{s.n}x{s.c}x{s.h}x{s.w}"
        return (self.plan.conv, shape, conv, self.plan.variant.name, self.plan.prologue.name, *numbers, bound)


_SITE_COLUMNS = (
    "site",
    "input",
    "convolution",
    "variant",
    "prologue",
    "MB moved",
    "MB kept",
    "GFLOP",
    "bound, modelled",
)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]) for row in rows]


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """The result of `explain`; it prints as a table.

    Args:
        sites: of the fused blocks, where images were given.  rates: whose rates `SiteRecord.seconds` is from, in words.
    """

    blocks: list[BlockRecord]
    engines: list[engines.EngineStatus]
    sites: list[SiteRecord] = dataclasses.field(default_factory=list)
    rates: str = ""

    def __repr__(self) -> str:
        done = sum(record.fused for record in self.blocks)
        lines = [f"{done}/{len(self.blocks)} blocks fused"]
        if not self.blocks:
            lines = ["no block found: nothing here is a conv-BN-ReLU chain"]
        rows = [("block", "type", "runs", "extent", "memory", "reason")]
        for record in self.blocks:
            plan = record.plan
            where = (f"{plan.engine}, {plan.variant}", plan.extent, plan.memory) if plan else ("as written", "-", "-")
            rows.append((record.name or "(model)", record.kind, *where, record.reason))
        if self.blocks:
            lines += _table(rows)
        if self.sites:
            lines += ["", "one training step, forward and backward:"]
            lines += [*_table([_SITE_COLUMNS, *(site.cells() for site in self.sites)]), *self._reasons(), ""]
        for engine in self.engines:
            lines.append(f"engine {engine.name}: {'ready' if engine.available else 'not available'}, {engine.detail}")
        return "\n".join(lines)

    def _reasons(self) -> list[str]:
        """Every decision of the table once, with its reason, and whose rates the bounds are from."""
        decisions = [site.plan.variant for site in self.sites] + [site.plan.prologue for site in self.sites]
        lines = [f"{decision.name}: {decision.reason}" for decision in dict.fromkeys(decisions)]
        return [*lines, f"bound: {self.rates}"]


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Every block of ``model``: fused or not, with the reason and the plan; with ``x`` also every site.

    Args:
        x: images ``(N, C, H, W)`` as the model would get them, on any device; only shape and dtype are read, under
            autocast its dtype. Nothing runs on the model's device: a training step is counted on the meta device.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, ``x`` not a tensor.
        ValueError: ``x`` has not four dimensions or is not of floating point.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model: expected a torch.nn.Module, got {type(model).__name__}")
    if x is not None:
        _check_images(x)
    extents = _extents(model)
    records = []
    for name, module in model.named_modules():
        if isinstance(module, FusedTrunk) and (spec := module.__dict__[BINDING].spec) is not None:
            records.append(_fused_record(f"{name}.stem".lstrip("."), "stem", module, spec, "trunk"))
    blocks = list(find_chains(model))
    records += [_run_record(*found) for found in loose_runs(model, [name for name, _, _ in blocks])]
    for name, block, found in blocks:
        kind = type(block).__name__
        if isinstance(block, FusedBlock) and _sharded(block) and BINDING in block.__dict__:
            found = block.__dict__[BINDING].spec  # cannot be traced again, and was before it was sharded
        if isinstance(block, FusedBlock) and isinstance(found, ChainSpec):
            records.append(_fused_record(name, kind, block, found, extents.get(id(block), "block")))
        elif isinstance(found, Refusal):
            records.append(BlockRecord(name, kind, False, found.reason, None))
        else:
            reason = block.__dict__.get(REFUSAL, "a chain, but fuse has not been called")
            records.append(BlockRecord(name, kind, False, reason, None))
    sites, rates = ([], "") if x is None or not any(record.fused for record in records) else _sites(model, x)
    return Explanation(records, engines.describe(), sites, rates)


def _check_images(x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"explain: x: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"explain: x: expected floating-point (N, C, H, W), got {x.dtype} {tuple(x.shape)}")


def _sites(model: nn.Module, x: Tensor) -> tuple[list[SiteRecord], str]:
    """A record for each site, and where the rates of the bounds are from."""
    from .costs import Workload, rate_name

    model = synchronise.alone(model)
    weight = next(model.parameters())
    device = weight.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    images = torch.empty(x.shape, device="meta", dtype=dtype).to(memory_format=torch.channels_last)
    plans = site_plans(model, images)
    if not plans:
        return [], ""
    fused = copy.deepcopy(model)
    for module in fused.modules():
        if BINDING in module.__dict__:
            module.__dict__[BINDING] = module.__dict__[BINDING]._replace(engine=plans[0].engine)
    layers = {layer.name: layer for layer in Workload(model, images, autocast).count(fused, "explain").layers}
    rates, name = _rates(device), rate_name(dtype)
    records = []
    for site in plans:
        layer = layers[site.conv]
        bound = seconds = None
        if rates is not None:
            rate = name if name in rates.flops else "fp32"
            memory = layer.moved / rates.bandwidth >= layer.flops / rates.flops[rate]
            bound, seconds = "memory" if memory else "compute", layer.seconds(rates, rate)
        records.append(SiteRecord(site, layer.moved, layer.kept, layer.flops, bound, seconds))
    return records, "rates of this device are not known" if rates is None else f"{rates.name}, {rates.source}"


def _rates(device: str) -> Any:
    from . import devices

    return devices.measured_cpu() if device == "cpu" else devices.here()


def _sharded(block: nn.Module) -> bool:
    """Whether ``fully_shard`` holds a part of the block's parameters here and the rest elsewhere."""
    return any(type(parameter).__name__ == "DTensor" for parameter in block.parameters())


def _extents(model: nn.Module) -> dict[int, str]:
    """The extent of each block's chain, by the identity of the block."""
    extents: dict[int, str] = {}
    for kind, label in ((FusedStage, "stage"), (FusedTrunk, "trunk")):
        for module in model.modules():
            if isinstance(module, kind):
                alone = [
                    m for m in module.modules() if m is not module and isinstance(m, FusedStage) and stands_alone(m)
                ]
                apart = {id(inner) for stage in alone for inner in stage.modules()}
                blocks = [inner for inner in module.modules() if isinstance(inner, FusedBlock)]
                extents.update((id(inner), label) for inner in blocks if id(inner) not in apart)
    return extents


def _fused_record(name: str, kind: str, block: Fused | nn.Module, spec: ChainSpec, extent: str) -> BlockRecord:
    binding = block.__dict__[BINDING]
    reason = obstacle(block, binding)  # type: ignore[arg-type]
    if reason is not None:
        return BlockRecord(name, kind, False, reason, None)
    link = block.as_link() if isinstance(block, FusedBlock) else None
    reasons = remarks(block, spec, binding.memory, "known network" if kind == "stem" else None)
    if isinstance(block, FusedBlock) and link is None:
        reasons, extent = ["called by itself: hooked, wrapped or compiled alone"], "block"
    elif link is not None and recomputes(link):
        extent = "block"
    return BlockRecord(name, kind, True, "; ".join(reasons), _plan(block, spec, binding, extent))


def _run_record(name: str, net: nn.Module, found: ChainSpec | Refusal) -> BlockRecord:
    """A run loose in the forward of ``net``, named after its first convolution; or why there is none."""
    if isinstance(found, Refusal):
        return BlockRecord(name, type(net).__name__, False, found.reason, None)
    name = f"{name}.{found.sites[0].conv}".lstrip(".")
    binding = net.__dict__.get(BINDING) if isinstance(net, FusedNet) else None
    run = next((run for run in binding.runs if run.spec == found), None) if binding is not None else None
    if run is None:
        reason = net.__dict__.get(REFUSAL, "a chain, but fuse has not been called")
        return BlockRecord(name, "run", False, reason, None)
    reason = run_obstacle(net, run)
    if reason is not None:
        return BlockRecord(name, "run", False, reason, None)
    return BlockRecord(name, "run", True, "loose in the network's forward", _plan(net, found, run, "block"))


def _plan(block: nn.Module | Fused, spec: ChainSpec, binding, extent: str) -> BlockPlan:  # type: ignore[no-untyped-def]
    weight = child(block, spec.sites[0].conv).weight  # type: ignore[arg-type]
    engine = engines.select(weight.device, weight.dtype, binding.engine)
    sites = spec.sites if engine == "cpu" else spec.site_specs()  # there the projection ops run the shortcut
    convs = [child(block, site.conv) for site in sites]  # type: ignore[arg-type]
    return BlockPlan(engine, _variant(convs, engine), binding.memory, extent)


def _variant(convs: list[nn.Conv2d], engine: str) -> str:
    """Who runs a block's convolutions, and why where it is not our kernels."""
    if engine not in ("triton", "cpu"):
        return "library convolutions"
    choose, side = (cpu_plan.variant, _SOME_PIXELS) if engine == "cpu" else (plan.choose, 1)
    reasons = []
    for conv in convs:
        # The input is not known here, so a few pixels stand for it.
        chosen = choose(shape_of_conv(conv, (1, conv.in_channels, side, side), conv.weight.dtype))
        if chosen.name == plan.LIBRARY:
            reasons.append(chosen.reason)
    if not reasons:
        return "own convolutions"
    library = ", ".join(dict.fromkeys(reasons))
    if len(reasons) == len(convs):
        return f"library convolutions ({library})"
    return f"{len(convs) - len(reasons)} of {len(convs)} convolutions own, the rest library ({library})"
