"""What runs, and why: one record for every block of a model."""

from __future__ import annotations

import dataclasses

from torch import nn

from . import engines, plan
from .chain import recomputes
from .fuse import REFUSAL
from .kernels.geometry import precision
from .links import child, conv_padding
from .modules import BINDING, Fused, FusedBlock, FusedStage, FusedTrunk, obstacle
from .recognise import Refusal, find_chains
from .spec import ChainSpec


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


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """The result of `explain`; it prints as a table."""

    blocks: list[BlockRecord]
    engines: list[engines.EngineStatus]

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
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        if self.blocks:
            lines += ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]) for row in rows]
        for engine in self.engines:
            lines.append(f"engine {engine.name}: {'ready' if engine.available else 'not available'}, {engine.detail}")
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Every block of ``model``: fused or not, with the reason and the plan.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model: expected a torch.nn.Module, got {type(model).__name__}")
    extents = _extents(model)
    records = []
    for name, module in model.named_modules():
        if isinstance(module, FusedTrunk) and (spec := module.__dict__[BINDING].spec) is not None:
            records.append(_fused_record(f"{name}.stem".lstrip("."), "stem", module, spec, "trunk"))
    for name, block, found in find_chains(model):
        kind = type(block).__name__
        if isinstance(block, FusedBlock) and isinstance(found, ChainSpec):
            records.append(_fused_record(name, kind, block, found, extents.get(id(block), "block")))
        elif isinstance(found, Refusal):
            records.append(BlockRecord(name, kind, False, found.reason, None))
        else:
            reason = block.__dict__.get(REFUSAL, "a chain, but fuse has not been called")
            records.append(BlockRecord(name, kind, False, reason, None))
    return Explanation(records, engines.describe())


def _extents(model: nn.Module) -> dict[int, str]:
    """The extent of each block's chain, by the identity of the block."""
    extents: dict[int, str] = {}
    for kind, label in ((FusedStage, "stage"), (FusedTrunk, "trunk")):
        for module in model.modules():
            if isinstance(module, kind):
                extents.update((id(inner), label) for inner in module.modules() if isinstance(inner, FusedBlock))
    return extents


def _fused_record(name: str, kind: str, block: Fused | nn.Module, spec: ChainSpec, extent: str) -> BlockRecord:
    binding = block.__dict__[BINDING]
    reason = obstacle(block, binding)  # type: ignore[arg-type]
    if reason is not None:
        return BlockRecord(name, kind, False, reason, None)
    link = block.as_link() if isinstance(block, FusedBlock) else None
    if isinstance(block, FusedBlock) and link is None:
        return BlockRecord(
            name, kind, True, "hook on the block: it is called by itself", _plan(block, spec, binding, "block")
        )
    if link is not None and recomputes(link):
        extent = "block"
    return BlockRecord(
        name, kind, True, "recognised" if kind != "stem" else "known network", _plan(block, spec, binding, extent)
    )


def _plan(block: nn.Module | Fused, spec: ChainSpec, binding, extent: str) -> BlockPlan:  # type: ignore[no-untyped-def]
    weight = child(block, spec.sites[0].conv).weight  # type: ignore[arg-type]
    engine = engines.select(weight.device, weight.dtype, binding.engine)
    convs = [child(block, site.conv) for site in spec.site_specs()]  # type: ignore[arg-type]
    return BlockPlan(engine, _variant(convs, engine), binding.memory, extent)


def _variant(convs: list[nn.Conv2d], engine: str) -> str:
    """Who runs a block's convolutions, and why where it is not our kernels."""
    if engine != "triton":
        return "library convolutions"
    reasons = []
    for conv in convs:
        chosen = plan.choose(_shape(conv))
        if chosen.name == plan.LIBRARY:
            reasons.append(chosen.reason)
    if not reasons:
        return "own convolutions"
    library = ", ".join(dict.fromkeys(reasons))
    if len(reasons) == len(convs):
        return f"library convolutions ({library})"
    return f"{len(convs) - len(reasons)} of {len(convs)} convolutions own, the rest library ({library})"


def _shape(conv: nn.Conv2d) -> plan.ConvShape:
    """A convolution as the plan's rules see it; its input is not known here, so one pixel stands for it."""
    tf32 = precision(conv.weight.dtype) == "tf32"
    return plan.ConvShape(
        1,
        conv.in_channels,
        1,
        1,
        conv.out_channels,
        _pair(conv.kernel_size),
        _pair(conv.stride),
        conv_padding(conv),
        _pair(conv.dilation),
        conv.groups,
        conv.weight.dtype,
        tf32,
    )


def _pair(sides: tuple[int, ...]) -> tuple[int, int]:
    first, second = sides
    return first, second
