"""What a site's functions are called with: static descriptions and tensors, in named tuples."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Pair = tuple[int, int]


class Group(NamedTuple):
    """A process group, as the functional collectives name it, and how many ranks it has."""

    name: str
    ranks: int


class SiteCall(NamedTuple):
    """What is static about one call of a site."""

    engine: str
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    relu: bool
    training: bool  # batch statistics; False: running statistics (eval or frozen)
    momentum: float | None
    eps: float
    hand_stride: int = 1  # the block's shortcut is handed every so many pixels of the site's input
    projection: bool = False  # the site is a block's shortcut
    group: Group | None = None  # whose batches are one batch to the batch norm; None: this process alone


class SiteParams(NamedTuple):
    """The tensors of a site: the convolution's, then the batch norm's. Names are torch's."""

    weight: Tensor
    conv_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


class Skip(NamedTuple):
    """Static description of what a close adds: "none", "identity", "pad" or "projection"."""

    kind: str = "none"
    stride: int = 1
    channel_offset: int = 0


NO_SKIP = Skip()


class Source(NamedTuple):
    """Where a site's input comes from.

    plain: ``y`` is the input tensor itself. pending: a raw convolution output and its moments; the
    consumer applies affine and ReLU. join: pending, plus the shortcut to add before the ReLU.
    """

    kind: str
    y: Tensor
    moments: Tensor | None = None
    relu: bool = True
    skip: Skip = NO_SKIP
    residual: Tensor | None = None
    residual_moments: Tensor | None = None


def handed(x: Tensor, stride: int) -> Tensor:
    """What a site hands to its block's shortcut: ``x``, or the view of every ``stride``-th pixel that it reads."""
    return x if stride == 1 else x[:, :, ::stride, ::stride]


def unhanded(x: Tensor) -> tuple[Tensor, int]:
    """The tensor that ``x`` steps over, as far as it is read, and the stride of `handed`: its inverse.

    ``(x, 1)`` where ``x`` is dense in channels_last, or steps in another way.
    """
    n, c, p, _ = x.shape
    image, channel, row, pixel = x.stride()
    stride = pixel // max(c, 1)
    if 0 in x.shape or channel != 1 or stride < 2 or pixel != stride * c or row % (stride * c):
        return x, 1
    width = row // (stride * c)
    height = (p - 1) * stride + 1
    if n > 1:
        if image % (width * c):
            return x, 1
        height = image // (width * c)
    return x.as_strided((n, c, height, width), (image, 1, width * c, c)), stride


class SiteOutputs(NamedTuple):
    """What a site's forward makes.

    ``y``: the raw output. ``moments``: (5, K). ``x``: the activation that was convolved; may be None for a pending
    source, whose activation nobody else reads. ``mask``: of a join, the engine's compact form of its ReLU's mask, kept
    for backward; None where ``x`` itself serves. ``carrier``: an empty (2, K), where the engine made one.
    """

    y: Tensor
    moments: Tensor
    x: Tensor | None = None
    mask: Tensor | None = None
    carrier: Tensor | None = None


class SiteGrads(NamedTuple):
    """Gradients of a site's inputs; ``source`` and ``residual`` are those of the tensors in `Source`.

    ``conv_bias``, ``gamma`` and ``beta`` only where the engine makes them; they follow from the sums (`nodes`).
    """

    source: Tensor | None = None
    source_sums: Tensor | None = None
    residual: Tensor | None = None
    residual_sums: Tensor | None = None
    weight: Tensor | None = None
    conv_bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
