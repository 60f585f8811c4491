"""Counting one training step on the meta device: bytes, FLOPs, launches and memory, site by site.

A network runs forward and backward on the meta device at full size: every launch of our kernels is noted with
the tensors it names (`kernels.launch`), none is started, and every ATen operator that would start a kernel
is noted by a dispatch mode. Each launch counts each of its tensors once, as if nothing stayed in a cache
between two kernels and everything did within one. Not counted: the loss, the optimizer, casts by autocast.

    activations   of the size of a convolution's input or output, our kernels' and the operators'
    weights       filters, their gradients, and whatever else the operators touch
    partials      split-K partials, tile statistics, per-channel vectors

A record belongs to the layer whose parameter was read last. In a backward of operators alone the masks and sums come
before the convolution that they are made for, so there it is the layer whose parameter is read next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .kernels.launch import LaunchRecord, attribute, nbytes, owner, recording, storage_of
from .links import Link
from .modules import run_modules, stage_names
from .structure import BINDING

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Operators that start no kernel, beside views: they allocate, or drop the graph.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "resize_")


@dataclasses.dataclass(frozen=True)
class OperatorRecord:
    """One ATen operator: name, bytes of its tensors by kind, ``(read, written)``, FLOPs, and the layer's storage.

    ``named``: it read a parameter of that layer itself, or is one of the layer's own products.
    """

    name: str
    bytes: dict[str, tuple[int, ...]]
    flops: int = 0
    owner: int = 0
    named: bool = False

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(sum(sides) for sides in self.bytes.values())


def _flops(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Of an operator's matrix products, a multiply-add being two; 0 without any."""
    name = operator.overloadpacket.__name__
    if name in ("convolution", "projection_fwd"):
        y, weight = out[0] if name == "projection_fwd" else out, args[1]
        return 2 * y.numel() * weight[0].numel()
    if name == "convolution_backward":
        return 2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
    if name in ("projection_dgrad", "projection_wgrad"):
        return 2 * args[0].numel() * args[2].shape[1]
    formula = flop_registry.get(operator.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


class OperatorCount(TorchDispatchMode):
    """Notes every ATen operator that starts a kernel: not views, and not what only allocates.

    One operator is one call, whatever the number of kernels behind it: ``convolution_backward`` is one. A
    four-dimensional tensor is an activation unless one of the parameters of ``model`` has its sides.

    Attributes:
        records: one `OperatorRecord` per operator.
        live, peak: bytes of the tensors made since the start that live now, and the most that did at once.
        makers: the storage of every tensor that lives, to the layer that made it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.records: list[OperatorRecord] = []
        self.live = self.peak = 0
        self.makers: dict[int, int] = {}
        parameters = list(model.parameters())
        self._filters = {tuple(sorted(parameter.shape)) for parameter in parameters}
        self._parameters = {storage_of(parameter) for parameter in parameters}
        self._given = self._parameters | {storage_of(buffer) for buffer in model.buffers()}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operator, and note it."""
        out = operator(*args, **(kwargs or {}))
        read, written = (
            [t for t in _pytree.tree_leaves(side) if isinstance(t, Tensor)] for side in ((args, kwargs), out)
        )
        named = next((t for t in read if storage_of(t) in self._parameters), None)
        if named is not None:
            attribute(named)
        view = operator.is_view or torch.Tag.inplace_view in operator.tags
        if not view:
            self._follow(written)
        if not view and operator.overloadpacket.__name__ not in _ALLOCATIONS:
            activations = tuple(nbytes([t for t in side if self._is_image(t)]) for side in (read, written))
            weights = tuple(nbytes(side) - part for side, part in zip((read, written), activations))
            moved = {"activations": activations, "weights": weights}
            flops = _flops(operator, args, kwargs or {}, out)
            own = named is not None or flops > 0
            self.records.append(OperatorRecord(str(operator), moved, flops, owner(), own))
        return out

    def _is_image(self, t: Tensor) -> bool:
        return t.dim() == 4 and tuple(sorted(t.shape)) not in self._filters

    def _follow(self, made: list[Tensor]) -> None:
        """Note new memory, and have its end noted."""
        for t in made:
            storage, key = t.untyped_storage(), storage_of(t)
            if key in self.makers or key in self._given:
                continue
            self.makers[key] = owner()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        del self.makers[key]
        self.live -= size


@dataclasses.dataclass(frozen=True)
class Half:
    """The forward or the backward of a step: our launches, and the ATen operators between them."""

    launches: list[LaunchRecord]
    operators: list[OperatorRecord]

    @property
    def records(self) -> list[LaunchRecord | OperatorRecord]:
        """The launches, then the operators."""
        return [*self.launches, *self.operators]

    def moved(self, kind: str) -> int:
        """Bytes read and written of ``kind``: activations, weights or partials."""
        return sum(sum(record.bytes.get(kind, ())) for record in self.records)


@dataclasses.dataclass(frozen=True)
class Step:
    """One counted training step of ``batch`` images.

    Args:
        layers: storages of parameters to the names of the modules that own them, in the model's order.
        kept: bytes that the forward keeps for the backward, by the name of the layer that made them; parameters,
            buffers and images apart.
        peak: the most bytes alive at once, parameters, buffers and images apart; gradients are in it.
    """

    forward: Half
    backward: Half
    batch: int
    layers: dict[int, str] = dataclasses.field(default_factory=dict, compare=False)
    kept: dict[str, int] = dataclasses.field(default_factory=dict)
    peak: int = 0

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
        extent: where chains end: trunk, stage or block.
    """
    return _count(model, lambda: forward_in(model, images, extent), images)


def count_eager(model: nn.Module, images: Tensor) -> Step:
    """`count_step` of a stock model: ATen operators alone, each reading its tensors once.

    That is the best case, where batch norm's second read comes from a cache; `passes` has the other one.
    Parameters and images are in one dtype, so autocast's casts are not among the operators.
    """
    return _count(model, lambda: model(images), images)


def _preceding(records: list[OperatorRecord]) -> list[OperatorRecord]:
    """Operators of a backward, each of the layer whose parameter comes next: what precedes it is made for it."""
    operators, following = [], 0
    for record in reversed(records):
        following = record.owner if record.named else following
        operators.append(dataclasses.replace(record, owner=following or record.owner))
    return operators[::-1]


@contextlib.contextmanager
def _keeping(count: OperatorCount, given: set[int], layers: dict[int, str]) -> Iterator[dict[str, int]]:
    """Bytes kept for the backward in the block, by the layer that made them; complete when the block ends."""
    sizes: dict[int, int] = {}
    kept: dict[str, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in given:
            sizes[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
    for storage, size in sizes.items():
        name = layers.get(count.makers.get(storage, 0), "")
        kept[name] = kept.get(name, 0) + size


def _count(model: nn.Module, forward: Callable[[], Tensor], images: Tensor) -> Step:
    model.train()
    layers = {storage_of(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    given = {*layers, *map(storage_of, model.buffers()), storage_of(images)}
    halves: list[Half] = []
    with OperatorCount(model) as count:
        with recording(run=False) as launches, _keeping(count, given, layers) as kept:
            out = forward()
        halves.append(Half(launches, list(count.records)))
        gradient = torch.empty_like(out)
        count.records.clear()
        with recording(run=False) as launches:
            out.backward(gradient)
        halves.append(Half(launches, count.records if launches else _preceding(count.records)))
    model.zero_grad(set_to_none=True)
    return Step(halves[0], halves[1], images.shape[0], layers, kept, count.peak)
