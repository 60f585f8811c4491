"""Which variant of a convolution runs at a site, and why: what was measured on the device, else rules.

    own        our Triton kernels: batch norm, ReLU and join while loading, statistics and masks while storing; on the
               CPU our packed matrix products, with the same prologues and epilogues (`engines.cpu_plan`)
    library    the vendor's convolution, with our batch norm kernels around it
    extension  a block's shortcut by the C++/CUDA projection ops
    product    a small convolution of the CPU engine, as one matrix product

The rules are pure and ask no device. What `winners` holds for the very problem goes before them; what cannot run, and
`force`, go before both. A plan never changes results beyond rounding. What is kept for backward does not depend on it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor

from . import winners
from .calls import Pair, SiteCall
from .kernels.geometry import precision

OWN, LIBRARY, EXTENSION, PRODUCT = "own", "library", "extension", "product"
_FILTERS = (1, 3, 5, 7)
_IMAGE_CHANNELS = 4
_VECTOR_BYTES = 16
_MOST_PIXELS = 2**31 - 2**16
SMALL_PRODUCT = 2**19  # of input elements, filters and taps: `kSmallProduct` of the CPU engine


@dataclasses.dataclass(frozen=True)
class Variant:
    """A decision: ``own``, ``library``, ``product`` or, for a shortcut, ``extension``; and the reason in words."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ConvShape:
    """What a decision depends on: ``(N, C, H, W)`` into K channels with an R x S filter.

    ``projection``: 0 for a site of the main path; for a shortcut how many pixels of its input lie between two that
    it is handed, 1 where it is handed all. ``device``: `winners.device_name`; "" is the GPU in use, else the CPU.
    """

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
    projection: int = 0
    device: str = ""

    @property
    def out(self) -> Pair:
        """Height and width of the result."""
        sides = zip((self.h, self.w), self.padding, self.dilation, self.filter, self.stride, strict=True)
        p, q = ((n + 2 * pad - dilated * (taps - 1) - 1) // step + 1 for n, pad, dilated, taps, step in sides)
        return p, q


_forced: str | None = None
_refused: MutableMapping[object, str] = {}


def shape_of(
    engine: str,
    convolution: tuple[Pair, Pair, Pair, int],
    projection: bool,
    size: Sequence[int],
    strides: Sequence[int],
    filters: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> ConvShape:
    """The shape of a site: input ``size`` (N, C, H, W) with ``strides``, ``filters`` (K, C / groups, R, S).

    ``convolution``: stride, padding, dilation and groups.
    """
    (n, c, h, w), (k, _, r, s) = size, filters
    stride, padding, dilation, groups = convolution
    step = max(1, strides[3] // max(c, 1)) if projection and strides[1] == 1 else int(projection)
    tf32 = engine == "triton" and precision(dtype) == "tf32"
    sides = (_pair(stride), _pair(padding), _pair(dilation))
    return ConvShape(n, c, h, w, k, (r, s), *sides, groups, dtype, tf32, step, winners.device_name(device))


def shape_of_call(call: SiteCall, x: Tensor, weight: Tensor) -> ConvShape:
    """`shape_of` a site that convolves ``x`` with ``weight``."""
    convolution = (call.stride, call.padding, call.dilation, call.groups)
    return shape_of(call.engine, convolution, call.projection, x.shape, x.stride(), weight.shape, x.dtype, x.device)


def _pair(sides: Pair) -> Pair:
    return sides[0], sides[1]


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


def forced() -> bool:
    """Whether `force` holds: then no shortcut runs by the projection ops."""
    return _forced is not None


def forced_name() -> str | None:
    """The variant that `force` asks for, or None."""
    return _forced


def refuse(shape: ConvShape, reason: str) -> None:
    """Remember that our kernels cannot run ``shape`` on this machine: the library serves it from now on."""
    _refused[shape] = reason


@contextlib.contextmanager
def trial() -> Iterator[MutableMapping[object, str]]:
    """Forget after the block what is refused in it; yields those refusals."""
    global _refused
    previous = _refused
    _refused = collections.ChainMap({}, previous)
    try:
        yield _refused.maps[0]
    finally:
        _refused = previous


def impossible(shape: ConvShape) -> str | None:
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


def _device(shape: ConvShape) -> str:
    return shape.device or winners.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def problem_key(shape: ConvShape, engine: str) -> str:
    """The shape in words that hold all of it: what `winners` knows it by."""
    device = _device(shape)
    return _problem_key(shape, engine, device, torch.get_num_threads() if device.startswith("cpu") else 0)


@functools.lru_cache(maxsize=4096)
def _problem_key(shape: ConvShape, engine: str, device: str, threads: int) -> str:
    words = (
        f"{engine}, {threads} threads" if threads else engine,
        *(["shortcut"] if shape.projection else []),
        *([f"1 in {shape.projection} pixels"] if shape.projection > 1 else []),
        f"{shape.n}x{shape.c}x{shape.h}x{shape.w} to {shape.k}",
        *(f"{name} {'x'.join(map(str, getattr(shape, name)))}" for name in ("filter", "stride", "padding", "dilation")),
        f"groups {shape.groups}",
        f"{str(shape.dtype).removeprefix('torch.')}{' by TF32' if shape.tf32 else ''}",
    )
    return winners.store.problem_key(device, ", ".join(words))


def _measured(shape: ConvShape, engine: str, names: tuple[str, ...]) -> Variant | None:
    """What was measured for the shape, where that is one of ``names``."""
    winners.ready(_device(shape))
    found = winners.lookup(problem_key(shape, engine)) if winners.token else None
    if found is None or found.choice not in names:
        return None
    return Variant(str(found.choice), found.words)


def decided(shape: ConvShape, engine: str) -> Variant | None:
    """What is forced or was measured for a site that both variants can run."""
    if _forced is not None:
        return Variant(_forced, "forced")
    return _measured(shape, engine, (OWN, LIBRARY))


def choose(shape: ConvShape) -> Variant:
    """The variant of a site's convolution on the Triton engine."""
    if reason := impossible(shape):
        return Variant(LIBRARY, reason)
    if chosen := decided(shape, "triton"):
        return chosen
    if reason := _slow(shape):
        return Variant(LIBRARY, reason)
    return Variant(OWN, "batch norm, ReLU and statistics inside the convolution")


def shortcut(shape: ConvShape, engine: str) -> Variant:
    """Who runs a block's shortcut that the projection ops can run; without them the engine runs it as any site."""
    names = (EXTENSION, LIBRARY, OWN) if engine == "triton" else (EXTENSION, LIBRARY)
    if measured := _measured(shape, engine, names):
        return measured
    if is_small(engine, (shape.n, shape.c, shape.h, shape.w), (shape.k, shape.c, 1, 1), shape.dtype):
        return Variant(LIBRARY, "so small that its calls cost more than its products")
    return Variant(EXTENSION, "batch norm inside the projection ops")


def is_small(engine: str, size: Sequence[int], filters: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the CPU engine runs a convolution without groups as one matrix product, in one op with its site.

    Args:
        size: of the input (N, C, H, W).  filters: (K, C, R, S).
    """
    (n, c, h, w), (k, _, r, s) = size, filters
    taken = engine == "cpu" and dtype in (torch.float32, torch.float64)
    return taken and n * c * h * w * k * r * s <= SMALL_PRODUCT


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
        return Variant("materialised", "only our own kernels do them while loading")
    if source == "join" and skip == "pad":
        return Variant("materialised", "a padded shortcut has another shape than the activation")
    if source == "join" and not owns_every_pixel:
        return Variant("materialised", "the filter skips or repeats pixels, and a join stores each of them once")
    return Variant(
        "fused", "the join is made while loading" if source == "join" else "batch norm and ReLU while loading"
    )
