"""Which variant of a convolution runs at a site of the Triton engine, and why: rules, pure and without a device.

    own        our kernels: batch norm, ReLU and join while loading, statistics and masks while storing
    library    the vendor's convolution, with our batch norm kernels around it

A plan never changes results beyond rounding. What is kept for backward does not depend on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from .calls import Pair

OWN, LIBRARY = "own", "library"
_FILTERS = (1, 3, 5, 7)
_IMAGE_CHANNELS = 4
_VECTOR_BYTES = 16
_MOST_PIXELS = 2**31 - 2**16


@dataclasses.dataclass(frozen=True)
class Variant:
    """A decision: ``own`` or ``library``, and the reason in words."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ConvShape:
    """What a decision depends on: ``(N, C, H, W)`` into K channels with an R x S filter."""

    n: int
    c: int
    h: int
    w: int
    k: int
    filter: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    dtype: torch.dtype
    tf32: bool


_forced: str | None = None
_refused: dict[object, str] = {}


@contextlib.contextmanager
def force(name: str | None) -> Iterator[None]:
    """Let every site that can run variant ``name``, in the block, whatever the rules of speed say.

    Raises:
        ValueError: ``name`` is no variant.
    """
    global _forced
    if name not in (OWN, LIBRARY, None):
        raise ValueError(f"plan.force: name: expected {OWN!r}, {LIBRARY!r} or None, got {name!r}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def projection_extension() -> bool:
    """Whether the C++/CUDA ops run the shortcuts; `force` asks for what runs the other sites."""
    return _forced is None


def refuse(shape: ConvShape, reason: str) -> None:
    """Remember that our kernels cannot run ``shape`` on this machine: the library serves it from now on."""
    _refused[shape] = reason


def _impossible(shape: ConvShape) -> str | None:
    """Why our kernels cannot run the shape at all, or None."""
    if shape in _refused:
        return _refused[shape]
    if shape.groups != 1:
        return f"{shape.groups} groups"
    if shape.n * (shape.h + 2 * shape.padding[0]) * (shape.w + 2 * shape.padding[1]) >= _MOST_PIXELS:
        return "more pixels than 32 bits number"
    return None


def _slow(shape: ConvShape) -> str | None:
    """Why the rules expect the library to be faster, or None."""
    if any(side not in _FILTERS for side in shape.filter):
        return f"a filter of {shape.filter[0]}x{shape.filter[1]}"
    if shape.dtype == torch.float32 and not shape.tf32:
        return "exact float32 uses no tensor core"
    narrow = shape.c > _IMAGE_CHANNELS and shape.c * shape.dtype.itemsize % _VECTOR_BYTES
    if narrow or shape.k * shape.dtype.itemsize % _VECTOR_BYTES:
        return f"{shape.c} or {shape.k} channels are no multiple of 16 bytes"
    return None


def choose(shape: ConvShape) -> Variant:
    """The variant for ``shape``."""
    if reason := _impossible(shape):
        return Variant(LIBRARY, reason)
    if _forced is not None:
        return Variant(_forced, "forced")
    if reason := _slow(shape):
        return Variant(LIBRARY, reason)
    return Variant(OWN, "batch norm, ReLU and statistics inside the convolution")


def prologue(variant: str, source: str, skip: str, owns_every_pixel: bool) -> Variant:
    """How a site's convolution gets the activation of its source, and why.

    Args:
        variant: of the convolution.  source: plain, pending or join.
        skip: what a join adds: identity, pad or projection.
        owns_every_pixel: whether the convolution reads each pixel of its input at one tap that can own it.

    Returns:
        ``none``: it reads a finished tensor. ``fused``: batch norm, ReLU and join happen while loading.
        ``materialised``: they take a pass of their own.
    """
    if source == "plain":
        return Variant("none", "its input is a finished tensor")
    if variant != OWN:
        return Variant("materialised", "the library's convolution reads a finished tensor")
    if source == "join" and skip == "pad":
        return Variant("materialised", "a padded shortcut has another shape than the activation")
    if source == "join" and not owns_every_pixel:
        return Variant("materialised", "the filter skips or repeats pixels, and a join stores each of them once")
    return Variant(
        "fused", "the join is made while loading" if source == "join" else "batch norm and ReLU while loading"
    )
