"""What each rank does for the tests of ``DistributedDataParallel``: stock and fused models, wrapped in the same way."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from resnet_fused import fuse, site
from resnet_fused.modules import Fused, FusedBlock

from .harness import LAYOUTS, Outcome, step
from .ranks import share
from .sync_cases import Case, traces_chains

RANKS = 2
BATCHES, SIZE = (2, 1), (13, 12)
WIDE = torch.float64
STRIDES = "Grad strides do not match bucket view strides"


def descend(model: nn.Module, scale: float = 1.0) -> None:
    """One step against the gradients times ``scale``, which are then forgotten."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * scale * parameter.grad
                parameter.grad = None


class Partly(nn.Module):
    """A network with a convolution that its forward never calls."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.down = net, nn.Conv2d(4, 4, 1, dtype=WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A way to wrap a network; a run is two training steps."""

    options: tuple[tuple[str, Any], ...] = ()
    layout: str = "nchw"
    net: str = "stage"
    fuse_after: bool = False
    unused: bool = False
    accumulate: bool = False
    synchronised: bool = False
    compiled: bool = False

    def case(self) -> Case:
        """The network, its images and their gradients."""
        return Case(self.net, BATCHES, layout=self.layout, size=SIZE)

    def model(self, fused: bool) -> nn.Module:
        """The wrapped network, as this rank has it."""
        net = self.case().model().to(memory_format=LAYOUTS[self.layout])
        if fused and not self.fuse_after:
            fuse(net)
        ddp = DistributedDataParallel(Partly(net) if self.unused else net, **dict(self.options))
        if fused and self.fuse_after:
            fuse(ddp.module)
        if self.synchronised:  # not before: DDP refuses to wrap it on a CPU
            nn.SyncBatchNorm.convert_sync_batchnorm(ddp)
        assert any(isinstance(module, Fused) for module in ddp.modules()) == fused
        return torch.compile(ddp, backend="aot_eager") if self.compiled and fused else ddp  # type: ignore[return-value]

    def run(self, rank: int, fused: bool) -> list[Outcome]:
        """The outcomes of two steps."""
        case, model = self.case(), self.model(fused)
        outcomes = []
        for draw in range(2):
            x = case.images(draw).contiguous(memory_format=LAYOUTS[self.layout])
            x, dout = (share(t, BATCHES, rank) for t in (x, case.gradient(draw)))
            if self.accumulate:
                with model.no_sync():  # type: ignore[operator]
                    step(model, x.flip(0), dout)
            outcome = step(model, x, dout)
            outcomes.append({name.replace("_orig_mod.", ""): value for name, value in outcome.items()})
            descend(model)
        return outcomes


WAYS: dict[str, Wrapped] = {
    "as it is": Wrapped(),
    "channels_last": Wrapped(layout="channels_last"),
    "basic blocks": Wrapped(net="trunk", layout="channels_last"),
    "fused after": Wrapped(fuse_after=True),
    "find_unused_parameters": Wrapped((("find_unused_parameters", True),), unused=True),
    "static_graph": Wrapped((("static_graph", True),), layout="channels_last"),
    "gradient_as_bucket_view": Wrapped((("gradient_as_bucket_view", True),), layout="channels_last"),
    "no_sync": Wrapped(accumulate=True),
    "small buckets": Wrapped((("bucket_cap_mb", 0.001),), layout="channels_last"),
    "compiled": Wrapped(net="basic-projection", compiled=True),
}
SYNCHRONISED = {
    "synchronised": Wrapped(synchronised=True),
    "synchronised channels_last": Wrapped(synchronised=True, layout="channels_last", fuse_after=True),
    "synchronised static_graph": Wrapped((("static_graph", True),), synchronised=True),
}
FULLGRAPH = Case("basic", BATCHES, compiled=True)


@contextlib.contextmanager
def _stride_warnings(into: dict[str, Any], name: str) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    into[name] = [str(warning.message) for warning in caught if STRIDES in str(warning.message)]


class _OddStrides(torch.autograd.Function):
    """Hands back the gradient of a 1x1 convolution's weight in strides that are as good, and not the parameter's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        k, c = grad.shape[:2]
        return grad.as_strided((k, c, 1, 1), (c, 1, c, c))


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, _OddStrides.apply(self.weight))


def _events(rank: int) -> list[tuple[str, Any]]:
    """Of a backward, in order: each site's own, and each parameter whose gradient is ready."""
    wrapped = WAYS["channels_last"]
    model = wrapped.model(True)
    events: list[tuple[str, Any]] = []
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in names:
        parameter.register_post_accumulate_grad_hook(lambda p: events.append(("ready", names[p])))

    def watch(way: str, *arguments: Any) -> None:
        if way == "backward":
            events.append(("site", next(name for p, name in names.items() if p is arguments[3])))

    case = wrapped.case()
    with site.watched(watch):
        step(model, share(case.images(0), BATCHES, rank), share(case.gradient(0), BATCHES, rank))
    return events


def _average(rank: int) -> dict[str, Any]:
    """A moving average of a wrapped network: still fused, and equal to one of the stock network."""
    case = WAYS["as it is"].case()
    x = share(case.images(0), BATCHES, rank)
    outputs = {}
    for fused in (False, True):
        model = WAYS["as it is"].model(fused)
        average = AveragedModel(model)
        step(model, x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1
        average.update_parameters(model)
        outputs["fused" if fused else "stock"] = average.eval()(x).detach()
    blocks = [module for module in average.modules() if isinstance(module, FusedBlock)]
    shared = {id(p) for p in average.parameters()} & {id(p) for p in model.parameters()}
    return {**outputs, "blocks": len(blocks), "shared": len(shared), "copied": type(copy.deepcopy(model)).__name__}


def rank_sees(rank: int) -> dict[str, Any]:
    """Everything, in an order that is the same on all ranks."""
    torch.set_warn_always(True)
    seen: dict[str, Any] = {"warned": {}, "fused": {}, "stock": {}}
    with _stride_warnings(seen["warned"], "odd"):
        step(DistributedDataParallel(_Odd()), torch.ones(1, 3, 2, 2))
    for name, way in {**WAYS, **SYNCHRONISED}.items():
        with _stride_warnings(seen["warned"], name):
            seen["fused"][name] = way.run(rank, True)
        if not way.synchronised:  # stock refuses a CPU
            seen["stock"][name] = way.run(rank, False)
    if traces_chains():
        seen["fullgraph"] = FULLGRAPH.run(rank)
    seen["events"], seen["average"] = _events(rank), _average(rank)
    return seen
