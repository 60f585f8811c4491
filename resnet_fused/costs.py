"""What a training step of a network costs, layer by layer: stock, torch.compile, and ours in each memory mode.

Counted on the meta device (`counting`): bytes, FLOPs, launches, what is kept for the backward, and the most memory
that is alive at once. Modelled: torch.compile's bytes and launches, from the passes its generated code makes
(`passes.SCHEMES`), its memory as the stock model's; and every time, which is a floor: no kernel takes less than its
bytes by the device's bandwidth, nor less than its FLOPs by the device's rate. A layer is a convolution with its batch
norm.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .counting import Half, Step, count_eager, count_step
from .devices import GIB, Device
from .fuse import MEMORY_MODES, fuse, unfuse
from .kernels.geometry import precision
from .passes import SCHEMES, Site, sites
from .recognise import Refusal, find_chains

STOCK, COMPILED = "stock", "torch.compile"
SCHEME_NAMES = (STOCK, COMPILED, *MEMORY_MODES)
COUNTED, MODELLED = "counted", "modelled"
_SECANTS = 2
_RESERVE = GIB  # of a device's memory: its context, and workspaces of libraries
# Passes that convolutions alone make over a site's output, the next one's included: forward, backward.
_BARE = {"relu": (2, 4), "add": (2, 4), "projection": (1, 2)}
_COMPILED_LAUNCHES = (2, 2)  # of Inductor beside the convolution's own, per site: forward, backward


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel or operator of a layer: bytes read and written, and FLOPs."""

    moved: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's part of a step: its work, forward and backward, and bytes of its tensors kept for the backward."""

    name: str
    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    kept: int

    @property
    def moved(self) -> float:
        """Bytes read and written."""
        return sum(work.moved for work in (*self.forward, *self.backward))

    @property
    def flops(self) -> float:
        """Floating-point operations, a multiply-add being two."""
        return sum(work.flops for work in (*self.forward, *self.backward))

    @property
    def launches(self) -> int:
        """Kernels of ours, and operators that start at least one kernel each."""
        return len(self.forward) + len(self.backward)

    def seconds(self, device: Device, rate: str) -> float:
        """The modelled floor."""
        return sum(device.seconds(work.moved, work.flops, rate) for work in (*self.forward, *self.backward))


@dataclasses.dataclass(frozen=True)
class Cost:
    """A step by one scheme.

    Args:
        scheme: one of `SCHEME_NAMES`.  basis: counted or modelled.
        layers: in the model's order; what no layer owns is in the last one's that ran.
        batch: images.  alive: bytes alive at once at most, with the gradients, and without parameters and images.
        recount: ``alive`` for another number of images.
    """

    scheme: str
    basis: str
    layers: tuple[Layer, ...]
    batch: int
    alive: int
    recount: Callable[[int], int] = dataclasses.field(compare=False)

    @property
    def moved(self) -> float:
        """Bytes read and written."""
        return sum(layer.moved for layer in self.layers)

    @property
    def kept(self) -> int:
        """Bytes kept for the backward, parameters and images apart."""
        return sum(layer.kept for layer in self.layers)

    @property
    def launches(self) -> int:
        """See `Layer.launches`."""
        return sum(layer.launches for layer in self.layers)

    def seconds(self, device: Device, rate: str) -> float:
        """The modelled floor of the step."""
        return sum(layer.seconds(device, rate) for layer in self.layers)

    def largest_batch(self, device: Device, state: float, image: int) -> int:
        """Images that fit the device's memory beside ``state`` bytes, each image itself being of ``image`` bytes.

        What is alive at once is nearly linear in the batch, so a few counts near the answer find it.
        """
        room = device.memory - _RESERVE - state
        first, alive = self.batch, self.alive
        most = room / (alive / first + image)
        for _ in range(_SECANTS):
            if most < 1:
                return 0
            second, more = int(most), self.recount(int(most))
            slope = (more - alive) / (second - first) if second != first else alive / first
            most = (room - alive + slope * first) / (slope + image)
            first, alive = second, more
        return max(0, int(most))


def state_bytes(model: nn.Module, autocast: bool) -> int:
    """Bytes of parameters, buffers and one momentum each; under autocast also the weights' 16-bit copies.

    Args:
        model: in the dtype the step is counted in. Under autocast its parameters are float32 all the same, and their
            gradients, counted in 16 bits, are that much larger.
    """
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    size = next(model.parameters()).element_size()
    return buffers + parameters * (4 + 4 + 2 + 2 if autocast else 2 * size)


def _owners(model: nn.Module) -> dict[str, str]:
    """The name of every module with parameters, to its layer's: a batch norm belongs to its convolution."""
    owners = {}
    last = ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) or not isinstance(module, nn.modules.batchnorm._BatchNorm):
            last = name
        owners[name] = last
    for name, _, found in find_chains(model):
        if not isinstance(found, Refusal):
            prefix = f"{name}." if name else ""
            owners.update({f"{prefix}{s.bn}": f"{prefix}{s.conv}" for s in found.site_specs() if s.bn is not None})
    return owners


def _work(half: Half, name_of: dict[int, str]) -> dict[str, list[Work]]:
    """The launches and the operators of half a step, by layer."""
    by_layer: dict[str, list[Work]] = {}
    for record in half.records:
        by_layer.setdefault(name_of.get(record.owner, ""), []).append(Work(record.moved, record.flops))
    return by_layer


def _layers(step: Step, owners: dict[str, str]) -> tuple[Layer, ...]:
    name_of = {storage: owners[module] for storage, module in step.layers.items()}
    forward, backward = (_work(half, name_of) for half in (step.forward, step.backward))
    kept: dict[str, int] = {}
    for module, size in step.kept.items():
        kept[owners.get(module, "")] = kept.get(owners.get(module, ""), 0) + size
    names = dict.fromkeys([*name_of.values(), *forward, *backward, *kept])
    return tuple(
        Layer(name, tuple(forward.get(name, ())), tuple(backward.get(name, ())), kept.get(name, 0)) for name in names
    )


def _compiled(stock: Cost, found: Iterable[Site], itemsize: int) -> Cost:
    """Inductor's step: the stock's convolutions, and the passes its generated code makes around them."""
    by_name = {site.conv: site for site in found}
    layers = []
    for layer in stock.layers:
        site = by_name.get(layer.name)
        if site is None:
            layers.append(layer)
            continue
        halves = []
        for way, half in enumerate((layer.forward, layer.backward)):
            convolutions = tuple(work for work in half if work.flops)
            passes = SCHEMES["inductor"][site.kind][way] - _BARE[site.kind][way]
            extra = passes * site.elements * itemsize * stock.batch
            halves.append(convolutions + (Work(extra / _COMPILED_LAUNCHES[way], 0),) * _COMPILED_LAUNCHES[way])
        layers.append(Layer(layer.name, halves[0], halves[1], layer.kept))
    return dataclasses.replace(stock, scheme=COMPILED, basis=MODELLED, layers=tuple(layers))


def rate_name(dtype: torch.dtype) -> str:
    """The precision whose rate a convolution of ``dtype`` runs at: bf16, fp16, tf32 or fp32, by torch's flags."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(dtype) or ("tf32" if precision(dtype) == "tf32" else "fp32")


def _on_meta(model: nn.Module, dtype: torch.dtype, autocast: bool) -> nn.Module:
    """``model`` itself, moved; under autocast batch norm's parameters stay in float32."""
    model.to(device="meta", dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if autocast and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    return model


class Workload:
    """A network and its images, ready to be counted by any scheme; the stock model is, at once.

    Args:
        model: stock or fused, with its parameters anywhere; copied, and not touched.
        images: ``(N, C, H, W)`` on the meta device, in the dtype to count in.
        autocast: the dtype is autocast's, and parameters are float32. Casts of filters are not counted.

    Raises:
        ValueError: no block of the model can be fused.
    """

    def __init__(self, model: nn.Module, images: Tensor, autocast: bool = False) -> None:
        self._model, self._images, self._autocast = model, images, autocast
        stock = self._on_meta(unfuse(copy.deepcopy(model)))
        if all(isinstance(chain, Refusal) for _, _, chain in find_chains(stock)):
            raise ValueError("no block of the model can be fused; resnet-fused explain says why")
        self._owners = _owners(stock)
        self.sites = sites(stock, (images.shape[2], images.shape[3]))
        eager = count_eager(stock, images)
        self.stock = self._cost(STOCK, eager, lambda batch: count_eager(stock, self._batch_of(batch)).peak)

    def compiled(self) -> Cost:
        """torch.compile's step, modelled."""
        return _compiled(self.stock, self.sites, self._images.element_size())

    def fused(self, memory: str, engine: str) -> Cost:
        """Our step in a memory mode, counted with an engine."""
        return self.count(fuse(unfuse(copy.deepcopy(self._model)), memory=memory, engine=engine), memory)

    def count(self, fused: nn.Module, scheme: str) -> Cost:
        """The step of a fused copy of the model, which goes to the meta device; its bindings name their engine."""
        model = self._on_meta(fused)
        step = count_step(model, self._images)
        return self._cost(scheme, step, lambda batch: count_step(model, self._batch_of(batch)).peak)

    def _batch_of(self, batch: int) -> Tensor:
        """So many images of the same size."""
        sides = (batch, *self._images.shape[1:])
        return torch.empty(sides, device="meta", dtype=self._images.dtype).to(memory_format=torch.channels_last)

    def _on_meta(self, model: nn.Module) -> nn.Module:
        """``model`` itself, moved; under autocast batch norm's parameters stay in float32."""
        last = torch.channels_last
        model.to(device="meta", dtype=self._images.dtype, memory_format=last)  # type: ignore[call-overload]
        for module in model.modules():
            if self._autocast and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.float()
        return model

    def _cost(self, scheme: str, step: Step, recount: Callable[[int], int]) -> Cost:
        layers = _layers(step, self._owners)
        return Cost(scheme, COUNTED, layers, step.batch, step.peak, recount)


def step_costs(model: nn.Module, images: Tensor, autocast: bool = False, engine: str = "triton") -> dict[str, Cost]:
    """One training step of ``model`` by every scheme of `SCHEME_NAMES`. See `Workload`."""
    work = Workload(model, images, autocast)
    ours = {memory: work.fused(memory, engine) for memory in MEMORY_MODES}
    return {STOCK: work.stock, COMPILED: work.compiled(), **ours}
