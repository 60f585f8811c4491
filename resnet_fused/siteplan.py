"""The plan of a whole model: every site of every chain, with the engine, the variant and the prologue that will run.

Nothing runs on the model's device: shapes come from the stock model's forward on the meta device, decisions from
`resnet_fused.plan`. Memory modes and torch's flags (TF32, autocast's dtype) are in it. Deterministic algorithms change
nothing: our kernels always are, and the library's convolution follows torch's own flag.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import engines, plan, projected, winners
from .chain import hand_stride, recomputes
from .engines import cpu_plan
from .fuse import unfuse
from .kernels.geometry import Geometry, precision
from .links import Link, child, conv_padding
from .modules import FusedBlock, FusedStage, FusedTrunk, in_order, stage_names
from .nets import FusedNet, run_obstacle
from .spec import SiteSpec
from .structure import BINDING


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """How one convolution and its batch norm run.

    Args:
        conv, block: names in the model.  shape: of the convolution.
        engine: reference, cpu or triton.  variant: own, library, product or extension, and why.
        source: what its input is: plain, pending or join.  prologue: none, fused or materialised, and why.
        memory, extent: of its block.
    """

    conv: str
    block: str
    shape: plan.ConvShape
    engine: str
    variant: plan.Variant
    source: str
    prologue: plan.Variant
    memory: str
    extent: str


def conv_shapes(model: nn.Module, images: Tensor) -> dict[str, plan.ConvShape]:
    """Every convolution that the forward of a model calls, by name.

    Args:
        model: copied to the meta device as a stock model; not touched.  images: ``(N, C, H, W)`` on the meta device.
    """
    stock = unfuse(copy.deepcopy(model)).to(device="meta", dtype=images.dtype)
    found: dict[str, plan.ConvShape] = {}
    names = {module: name for name, module in stock.named_modules() if isinstance(module, nn.Conv2d)}

    def note(conv: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        x = given[0]
        found[names[conv]] = shape_of_conv(conv, tuple(x.shape), x.dtype)  # type: ignore[index,arg-type]

    hooks = [conv.register_forward_hook(note) for conv in names]
    try:
        with torch.no_grad():
            stock(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def shape_of_conv(conv: nn.Conv2d, size: tuple[int, ...], dtype: torch.dtype) -> plan.ConvShape:
    """A convolution of an input ``size`` (N, C, H, W) as the plan's rules see it, on no device in particular."""
    n, c, h, w = size
    pairs = (tuple(conv.kernel_size), tuple(conv.stride), conv_padding(conv), tuple(conv.dilation))
    tf32 = precision(dtype) == "tf32"
    return plan.ConvShape(n, c, h, w, conv.out_channels, *pairs, conv.groups, dtype, tf32)  # type: ignore[arg-type]


def _runs(model: nn.Module) -> Iterator[tuple[str, list[nn.Module | Link]]]:
    """Every chain that is run as one, by its extent: the modules and links in it, in order."""
    for module in model.modules():
        if isinstance(module, FusedNet):
            for run in module.__dict__[BINDING].runs:
                if run_obstacle(module, run) is None:
                    yield "block", [Link(module, run.spec, run.memory, run.engine)]
    inside: set[int] = set()
    for kind, extent in ((FusedTrunk, "trunk"), (FusedStage, "stage"), (FusedBlock, "block")):
        for module in model.modules():
            if not isinstance(module, kind) or id(module) in inside:
                continue
            if isinstance(module, FusedTrunk):
                run = list(module._trunk(module.__dict__[BINDING]))
                stages = [getattr(module, name) for name in stage_names(module)]
                inside.update(id(stage) for stage in stages if not any(part is stage for part in run))
            else:
                run = list(in_order(module)) if isinstance(module, FusedStage) else [module]
                nested = [m for m in module.modules() if isinstance(m, FusedStage)]
                inside.update(id(stage) for stage in nested if not any(part is stage for part in run))
            inside.update(id(part) for part in run if isinstance(part, FusedBlock))
            yield extent, run


def _sources(link: Link, pending: Link | None) -> tuple[str, str]:
    """What the block's first site reads, and what a join of it adds."""
    if pending is None or recomputes(link) or link.spec.shortcut.first:
        return "plain", "none"
    skip = "none" if pending.spec.post is not None else pending.spec.shortcut.kind
    joins = skip != "none" or link.spec.shortcut.kind != "none"
    return ("join" if joins else "pending"), skip


def site_plans(model: nn.Module, images: Tensor) -> list[SitePlan]:
    """The plan of every site of a fused model, in the order of its chains; blocks that run as written have none.

    Args:
        model: not touched.  images: ``(N, C, H, W)`` on the meta device, in the dtype that convolutions run in.
    """
    shapes = conv_shapes(model, images)
    names = {id(module): name for name, module in model.named_modules()}
    plans: list[SitePlan] = []
    for extent, run in _runs(model):
        pending: Link | None = None
        for part in run:
            link = part if isinstance(part, Link) else part.as_link() if isinstance(part, FusedBlock) else None
            if link is None:
                pending = None
                continue
            recomputing = recomputes(link)
            where = "block" if recomputing else extent
            plans += _plans_of_link(link, names[id(link.block)], shapes, images.dtype, _sources(link, pending), where)
            pending = None if recomputing or link.spec.pool is not None else link
    return plans


def _plans_of_link(
    link: Link,
    name: str,
    shapes: dict[str, plan.ConvShape],
    dtype: torch.dtype,
    first: tuple[str, str],
    extent: str,
) -> Iterator[SitePlan]:
    prefix = f"{name}." if name else ""
    for i, site in enumerate(link.spec.site_specs()):
        shape = shapes.get(f"{prefix}{site.conv}")
        if shape is None:
            continue
        shortcut = i == len(link.spec.sites)
        source, skip = first if i == 0 else ("plain" if shortcut else "pending", "none")
        engine, variant = _variant(link, site, shape, dtype, shortcut)
        weight = torch.empty((shape.k, shape.c // shape.groups, *shape.filter), device="meta")
        x = torch.empty((shape.n, shape.c, shape.h, shape.w), device="meta").to(memory_format=torch.channels_last)
        owns = Geometry.of(x, weight, shape.stride, shape.padding, shape.dilation).owns_every_pixel
        if engine == "cpu" and source == "join":
            prologue = plan.Variant("materialised", "on the CPU a join is a pass of its own")
        else:
            prologue = plan.prologue(variant.name, source, skip, owns)
        conv = f"{prefix}{site.conv}"
        yield SitePlan(conv, name, shape, engine, variant, source, prologue, link.memory, extent)


def _handed(shape: plan.ConvShape, step: int) -> plan.ConvShape:
    """The shape of a shortcut that is handed every ``step``-th pixel of its block's input."""
    if step == 1:
        return dataclasses.replace(shape, projection=1)
    h, w = -(-shape.h // step), -(-shape.w // step)
    return dataclasses.replace(shape, h=h, w=w, stride=(1, 1), projection=step)


def _variant(
    link: Link, site: SiteSpec, shape: plan.ConvShape, dtype: torch.dtype, shortcut: bool
) -> tuple[str, plan.Variant]:
    conv = child(link.block, site.conv)
    engine = engines.select(conv.weight.device, dtype, link.engine)
    shape = dataclasses.replace(shape, device=winners.device_name(conv.weight.device))
    x = conv.weight.new_empty(0, dtype=dtype)
    if shortcut:
        shape = _handed(shape, 1 if recomputes(link) else hand_stride(link, engine))
    if shortcut and projected.takes(engine, x, conv.weight, conv_padding(conv), conv.groups):
        runs = plan.shortcut(shape, engine)
        if runs.name == plan.EXTENSION or engine != "triton":
            return engine, runs
    if engine == "triton":
        return engine, plan.choose(shape)
    if engine == "cpu":
        return engine, cpu_plan.variant(shape)
    return engine, plan.Variant(plan.LIBRARY, f"on {conv.weight.device.type}, with PyTorch's passes around it")
