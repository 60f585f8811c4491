"""Passes over activations in one training step, by site and by scheme, and the bytes they come to.

T is one convolution output. Every full read or write of a T-sized activation counts one, the convolutions'
own included: forward, a convolution writes y and the next one reads its input; backward, the next dgrad
writes the gradient, the next wgrad reads its input, and the site's own dgrad and wgrad each read dy.
Tensors are taken to be larger than any cache, dgrad and wgrad are separate kernels, and per-channel vectors
are left out. Forward / backward:

    scheme          conv-BN-ReLU   conv-BN-add-ReLU   projection's conv-BN
    eager           7 / 12         10 / 15            4 / 7
    inductor        5 / 11         6 / 14             2 / 5
    mlperf          2 / 8          5 / 10             1 / 6
    ours            2 / 7          5 / 11             1 / 5
    ours, joined                   4 / 9

eager: conv W; batch norm 2R W; ReLU R W; next conv R | dgrad W; wgrad R; threshold 2R W; batch norm 4R W;
dgrad R, wgrad R. An add costs 2R W, its backward's accumulation 2R W.
inductor: conv W; Welford R; normalise and ReLU R W; next conv R | W; R; two fused kernels 3R, 3R W; 2R
(read in generated code of its training batch norm; the add's backward is the mean of two alternating forms).
mlperf: the chain of the MXNet container: statistics in conv's epilogue, batch norm and ReLU in the next
one's prologue, ScaleBiasAddRelu at a block's end | dgrad's epilogue R W; wgrad R; dbn_apply 2R W; 2R.
ours: the same without dbn_apply, which dgrad and wgrad do while loading: 2R each. A projection's z is added
at the block's end, so its forward is one write; its backward is R for the sums, and 2R each in dgrad and
wgrad. joined: the next block's first convolution adds the shortcut while loading and writes ``out``.
In 16 bits it writes the mask too, a bit for each element, which the backward reads instead of ``out``: 4 1/16 / 8 1/16.

What the table leaves out, counted in `resnet_fused.traffic`: the image, a projection's reads of the block's
input, the max pool (whose output is a quarter of T), the average pool and the classifier.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from .recognise import Refusal, find_chains

Passes = tuple[int, int]
EXTENTS = ("trunk", "stage", "block")
SCHEMES: dict[str, dict[str, Passes]] = {
    "eager": {"relu": (7, 12), "add": (10, 15), "projection": (4, 7)},
    "inductor": {"relu": (5, 11), "add": (6, 14), "projection": (2, 5)},
    "mlperf": {"relu": (2, 8), "add": (5, 10), "projection": (1, 6)},
}
OURS: dict[str, Passes] = {"relu": (2, 7), "add": (5, 11), "joined": (4, 9), "projection": (1, 5)}
# What the table leaves out may cost this much of the whole before it is a finding.
_ALLOWANCE = 1.003
MB = 1e6
# Weights and partials together, MB per image: they are read once a step, so only a large batch makes them small.
REST_BOUND_MB = 10
LARGE_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Site:
    """A convolution and its batch norm.

    Args:
        conv: the convolution's name in the model.
        kind: relu, add (a block's last site) or projection.
        elements: of its output, per image.
        stage, last: where its block stands: the stage's number, and whether it is the stage's last block.
    """

    conv: str
    kind: str
    elements: int
    stage: str
    last: bool


def sites(model: nn.Module, image: int | tuple[int, int]) -> list[Site]:
    """The sites of a stock residual network on the meta device, sized by running its forward.

    A convolution outside every block is the stem's, a conv-BN-ReLU site.

    Args:
        image: height and width in pixels; of a square, its side.
    """
    elements: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}

    def note(module: nn.Module, _: object, out: torch.Tensor) -> None:
        elements[names[module]] = out[0].numel()  # type: ignore[index]

    first, sides = next(iter(names)), (image, image) if isinstance(image, int) else image
    hooks = [conv.register_forward_hook(note) for conv in names]
    try:
        with torch.no_grad():
            model(torch.empty(2, first.in_channels, *sides, device="meta", dtype=first.weight.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    kinds = {}
    blocks = [(name, found) for name, _, found in find_chains(model) if not isinstance(found, Refusal)]
    for i, (name, spec) in enumerate(blocks):
        stage = name.rpartition(".")[0]
        place = (stage, i + 1 == len(blocks) or blocks[i + 1][0].rpartition(".")[0] != stage)
        for site in spec.sites:
            kinds[f"{name}.{site.conv}"] = ("relu", *place)
        if spec.shortcut.kind != "none":
            kinds[f"{name}.{spec.sites[-1].conv}"] = ("add", *place)
        if spec.shortcut.site is not None:
            kinds[f"{name}.{spec.shortcut.site.conv}"] = ("projection", *place)
    found = []
    for conv, size in elements.items():
        kind, stage, last = kinds.get(conv, ("relu", "", False))
        found.append(Site(conv, kind, size, stage, last))
    return found


def modelled(found: list[Site], scheme: str, itemsize: int = 2) -> tuple[float, float]:
    """``(forward, backward)`` activation bytes per image of one training step, by `SCHEMES`."""
    table = SCHEMES[scheme]
    forward, backward = (sum(table[site.kind][way] * site.elements * itemsize for site in found) for way in (0, 1))
    return forward, backward


def floor(found: list[Site], extent: str, itemsize: int = 2) -> float:
    """Activation bytes per image by our own passes, with the junctions joined that ``extent`` joins."""
    final = next((site.conv for site in reversed(found) if site.kind == "add"), None)
    total = 0
    for site in found:
        joined = (
            site.kind == "add"
            and {
                "block": False,
                "stage": not site.last,
                "trunk": site.conv != final,
            }[extent]
        )
        total += sum(OURS["joined" if joined else site.kind]) * site.elements * itemsize
    return total


def bound_mb(found: list[Site], extent: str, itemsize: int = 2) -> int:
    """The most activations one step may move, MB per image: `floor` and 0.3 %, rounded up to a whole MB.

    For ResNet-50 in 16 bits: block 270, stage 245, trunk 237. For ResNet-18, by the same rule from the same
    passes: 55, 53 and 50. The 0.3 % is for what the table leaves out, and is mostly spare: in the table the
    stem's output goes on at full size, in the network the pool has made it a quarter.
    """
    return math.ceil(floor(found, extent, itemsize) / MB * _ALLOWANCE)
