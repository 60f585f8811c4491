"""The bytes of one training step beside their bounds, and the passes per site that they come to.

Counted by `resnet_fused.counting` on the meta device; the schemes beside them are those of `resnet_fused.passes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .counting import DTYPES, Step, count_eager, count_step, meta_images, on_meta
from .eager import Bottleneck, ResNet
from .fuse import fuse
from .passes import EXTENTS, LARGE_BATCH, MB, REST_BOUND_MB, SCHEMES, bound_mb, modelled, sites
from .resnet import BUILDERS


class SitePasses(NamedTuple):
    """Passes over one convolution output in training, ``(forward, backward)``, at an inner site of each kind."""

    relu: tuple[float, float]
    add: tuple[float, float]


def count_passes(extent: str, batch: int = 8, image: int = 224, dtype: torch.dtype = torch.bfloat16) -> SitePasses:
    """Measure the passes per site from the launches of bottleneck networks that differ by one inner block.

    A block more is two conv-BN-ReLU sites of T bytes and one site with an add, of 4 T where blocks are four
    times as wide as their bottlenecks, and of 2 T in the wide networks: two equations for two unknowns. Nothing
    is assumed about which kernel does what.
    """
    extra = {}
    for width in (64, 128):
        moved = []
        for blocks in (3, 4):

            def build(width: int = width, blocks: int = blocks) -> nn.Module:
                return ResNet(Bottleneck, (2, 2, blocks, 2), width_per_group=width)

            model = fuse(on_meta(build, dtype), engine="triton")
            step = count_step(model, meta_images(batch, image, dtype), extent)
            moved.append((step.forward.moved("activations"), step.backward.moved("activations")))
        extra[width] = tuple(more - less for less, more in zip(*moved))
    pixels = batch * (image // 16) ** 2 * dtype.itemsize
    narrow, wide, out = 256 * pixels, 512 * pixels, 1024 * pixels
    relu = tuple((extra[128][way] - extra[64][way]) / (2 * (wide - narrow)) for way in (0, 1))
    add = tuple((extra[64][way] - 2 * narrow * relu[way]) / out for way in (0, 1))
    return SitePasses(relu, add)


def compare(network: str, batch: int, image: int, dtype: str, extents: Sequence[str] = EXTENTS) -> dict[str, Any]:
    """One training step in every extent, eager's, and the schemes of the table: MB (1e6 bytes) per image, and counts.

    Args:
        network: one of `BUILDERS`.  dtype: one of `DTYPES`.

    Raises:
        ValueError: unknown ``network``.
    """
    if network not in BUILDERS:
        raise ValueError(f"model: expected one of {', '.join(BUILDERS)}, got {network!r}")
    of = DTYPES[dtype]
    images = meta_images(batch, image, of)
    stock = on_meta(lambda: BUILDERS[network](fused=False), of)
    found = sites(stock, image)
    eager = count_eager(stock, images)
    fused = fuse(stock, engine="triton")
    lines = {}
    for extent in extents:
        step = count_step(fused, images, extent)
        bound = bound_mb(found, extent, of.itemsize)
        rest = (step.per_image("weights") + step.per_image("partials")) / MB
        over = step.per_image("activations") > bound * MB or (batch >= LARGE_BATCH and rest > REST_BOUND_MB)
        lines[extent] = {**_numbers(step), "bound": bound, "launches": step.launches, "over": over}
    schemes = {}
    for scheme, table in SCHEMES.items():
        forward, backward = (value / MB for value in modelled(found, scheme, of.itemsize))
        total = {"forward": forward, "backward": backward, "activations": forward + backward}
        schemes[scheme] = {**total, "passes": table}
    return {"extents": lines, "eager": _numbers(eager), "schemes": schemes}


def _numbers(step: Step) -> dict[str, float]:
    halves = {"forward": step.forward, "backward": step.backward}
    numbers = {name: half.moved("activations") / step.batch / MB for name, half in halves.items()}
    kinds = {kind: step.per_image(kind) / MB for kind in ("activations", "weights", "partials")}
    by_operators = sum(sum(record.bytes["activations"]) for half in halves.values() for record in half.operators)
    return {**numbers, **kinds, "by_operators": by_operators / step.batch / MB, "operators": step.operators}
