"""Counted bytes of one training step: what our kernels and the ATen operators between them read and write.

A fused network runs forward and backward on the meta device at full size: every kernel's launch is noted with
the tensors it names (`kernels.launch`), none is started, and every ATen operator that would start a kernel
is noted by a dispatch mode. Each launch counts each of its tensors once, as if nothing stayed in a cache
between two kernels and everything did within one. Not counted: the loss, the optimizer, casts by autocast.

    activations   of the size of a convolution's input or output, our kernels' and the operators'
    weights       filters, their gradients, and whatever else the operators touch
    partials      split-K partials, tile statistics, per-channel vectors
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .chain import Link
from .eager import Bottleneck, ResNet
from .fuse import fuse
from .kernels.launch import LaunchRecord, nbytes, recording
from .modules import BINDING, run_modules, stage_names
from .passes import EXTENTS, LARGE_BATCH, MB, REST_BOUND_MB, SCHEMES, bound_mb, modelled, sites
from .resnet import BUILDERS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Operators that start no kernel, beside views: they allocate, or drop the graph.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "resize_")


@dataclasses.dataclass(frozen=True)
class OperatorRecord:
    """One ATen operator: its name, and the bytes of its tensors by kind, ``(read, written)``."""

    name: str
    bytes: dict[str, tuple[int, ...]]


class OperatorCount(TorchDispatchMode):
    """Notes every ATen operator that starts a kernel: not views, and not what only allocates.

    One operator is one call, whatever the number of kernels behind it: ``convolution_backward`` is one. A
    four-dimensional tensor is an activation unless one of the parameters of ``model`` has its sides.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.records: list[OperatorRecord] = []
        self._filters = {tuple(sorted(parameter.shape)) for parameter in model.parameters()}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operator, and note it."""
        out = operator(*args, **(kwargs or {}))
        view = operator.is_view or torch.Tag.inplace_view in operator.tags
        if not view and operator.overloadpacket.__name__ not in _ALLOCATIONS:
            read, written = (
                [t for t in _pytree.tree_leaves(side) if isinstance(t, Tensor)] for side in ((args, kwargs), out)
            )
            activations = tuple(nbytes([t for t in side if self._is_image(t)]) for side in (read, written))
            weights = tuple(nbytes(side) - part for side, part in zip((read, written), activations))
            self.records.append(OperatorRecord(str(operator), {"activations": activations, "weights": weights}))
        return out

    def _is_image(self, t: Tensor) -> bool:
        return t.dim() == 4 and tuple(sorted(t.shape)) not in self._filters


@dataclasses.dataclass(frozen=True)
class Half:
    """The forward or the backward of a step: our launches, and the ATen operators between them."""

    launches: list[LaunchRecord]
    operators: list[OperatorRecord]

    def moved(self, kind: str) -> int:
        """Bytes read and written of ``kind``: activations, weights or partials."""
        ours = sum(sum(record.bytes[kind]) for record in self.launches)
        return ours + sum(sum(record.bytes.get(kind, ())) for record in self.operators)


@dataclasses.dataclass(frozen=True)
class Step:
    """One counted training step of ``batch`` images."""

    forward: Half
    backward: Half
    batch: int

    def per_image(self, kind: str) -> float:
        """Bytes per image of ``kind``, forward and backward."""
        return (self.forward.moved(kind) + self.backward.moved(kind)) / self.batch

    @property
    def launches(self) -> int:
        """Launches of our kernels."""
        return len(self.forward.launches) + len(self.backward.launches)

    @property
    def operators(self) -> int:
        """ATen operators that start kernels."""
        return len(self.forward.operators) + len(self.backward.operators)


@contextlib.contextmanager
def _counting(model: nn.Module) -> Iterator[tuple[list[LaunchRecord], list[OperatorRecord]]]:
    with recording(run=False) as launches, OperatorCount(model) as operators:
        yield launches, operators.records


def meta_images(batch: int, image: int, dtype: torch.dtype, channels: int = 3) -> Tensor:
    """``(batch, channels, image, image)`` channels_last on the meta device."""
    images = torch.empty(batch, channels, image, image, device="meta", dtype=dtype)
    return images.to(memory_format=torch.channels_last)


def on_meta(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The model that ``build`` makes, stock, in ``dtype`` and channels_last on the meta device."""
    with torch.device("meta"):
        model = build()
    return model.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def forward_in(model: Any, images: Tensor, extent: str) -> Tensor:
    """The output of a fused network, with chains that end where ``extent`` says: trunk, stage or block."""
    if extent == "trunk":
        return model(images)
    binding = model.__dict__[BINDING]
    x = run_modules([Link(model, binding.spec, binding.memory, binding.engine)], images)
    for name in stage_names(model):
        stage = getattr(model, name)
        for module in stage if extent == "block" else (stage,):
            x = module(x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def count_step(model: nn.Module, images: Tensor, extent: str = "trunk") -> Step:
    """Count one training step of a fused network on the meta device.

    Args:
        model: fused with ``engine="triton"``; its parameters, and ``images`` (N, C, H, W), on the meta device.
        extent: where chains end, see `EXTENTS`.
    """
    return _count(model, lambda: forward_in(model, images, extent), images.shape[0])


def count_eager(model: nn.Module, images: Tensor) -> Step:
    """`count_step` of a stock model: ATen operators alone, each reading its tensors once.

    That is the best case, where batch norm's second read comes from a cache; `passes` has the other one.
    Parameters and images are in one dtype, so autocast's casts are not among the operators.
    """
    return _count(model, lambda: model(images), images.shape[0])


def _count(model: nn.Module, forward: Callable[[], Tensor], batch: int) -> Step:
    model.train()
    with _counting(model) as first:
        out = forward()
    gradient = torch.empty_like(out)
    with _counting(model) as second:
        out.backward(gradient)
    model.zero_grad(set_to_none=True)
    return Step(Half(*first), Half(*second), batch)


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
