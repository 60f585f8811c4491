"""What each rank does for the tests of ``SyncBatchNorm``: cases of one model, one way to run it, and uneven batches."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused import eager_blocks as eager
from resnet_fused import fuse
from resnet_fused.modules import Fused

from .harness import LAYOUTS, Outcome, randomise, step
from .ranks import share
from .tune_harness import need_a_traced_chain

RANKS = 3
UNEVEN, EMPTY, ONE_EACH = (1, 3, 2), (2, 0, 1), (1, 1, 1)
DRAWS = {torch.float64: 1, torch.float32: 4, torch.bfloat16: 32}  # see `harness.hold_to_law`


def _projection(c: int, k: int, stride: int, bias: bool = False) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=bias), nn.BatchNorm2d(k))


class Written(nn.Module):
    """A block in a user's own words, which `fuse` recognises by tracing and proves by its probe."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU())
        self.last, self.norm = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.last(self.body(x))) + x)


def trunk() -> nn.Module:
    """A whole network: stem with max pool, two stages, a projection, a classifier."""
    return resnet_fused.from_stages(
        [2, 1], [8, 12], stem_kernel=3, stem_relu=True, stem_pool=True, bias=False, shortcut="B", fused=False
    )


def stage() -> nn.Module:
    """Bottlenecks whose junctions are joined."""
    shortcut = _projection(8, 16, 2)
    return nn.Sequential(eager.Bottleneck(8, 4, 2, shortcut), eager.Bottleneck(16, 4), eager.Bottleneck(16, 4))


NETS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: eager.BasicBlock(8, 8, bias=True),
    "basic-pad": lambda: eager.BasicBlock(8, 16, 2, eager.PadShortcut(2, 4, 16)),
    "basic-projection": lambda: eager.BasicBlock(8, 12, 2, _projection(8, 12, 2, bias=True)),
    "bottleneck": lambda: eager.Bottleneck(8, 4, 2, _projection(8, 16, 2)),
    "bottleneck-8": lambda: eager.Bottleneck(8, 8, 1, _projection(8, 8, 1), out_channels=8),
    "grouped": lambda: eager.Bottleneck(8, 8, groups=4, base_width=32, out_channels=8),
    "stem": lambda: eager.Stem(8, 12, 3, 1),
    "written": lambda: Written(8),
    "stage": stage,
    "trunk": trunk,
}


def _some_in_eval(model: nn.Module) -> None:
    """Every other batch norm is in eval mode."""
    for i, module in enumerate(m for m in model.modules() if isinstance(m, nn.SyncBatchNorm | nn.BatchNorm2d)):
        module.train(i % 2 == 0)


def _cumulative(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm | nn.BatchNorm2d):
            module.momentum = None


def _untracked(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm | nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def _frozen_weights(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


def _eval(model: nn.Module) -> None:
    model.eval()


STATES: dict[str, Callable[[nn.Module], None]] = {
    "some in eval": _some_in_eval,
    "cumulative": _cumulative,
    "untracked": _untracked,
    "frozen weights": _frozen_weights,
    "eval": _eval,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, how it is run, and how many images each rank has."""

    net: str
    batches: tuple[int, ...] = UNEVEN
    dtype: torch.dtype = torch.float64
    engine: str | None = None
    memory: str = "speed"
    layout: str = "channels_last"
    state: str | None = None
    compiled: bool = False
    converted_first: bool = False
    size: tuple[int, int] = (7, 6)
    more: int = 1  # times as many draws

    @property
    def draws(self) -> int:
        """How many joined batches the law may need."""
        return DRAWS[self.dtype] * self.more

    def model(self) -> nn.Module:
        """The stock model, with plain batch norms."""
        torch.manual_seed(0)
        model = randomise(NETS[self.net]()).to(self.dtype)
        if self.state is not None:
            STATES[self.state](model)
        return model

    def images(self, draw: int) -> Tensor:
        """The joined batch."""
        channels = 3 if self.net == "trunk" else 8
        generator = torch.Generator().manual_seed(draw)
        return torch.randn(sum(self.batches), channels, *self.size, generator=generator).to(self.dtype)

    def gradient(self, draw: int) -> Tensor:
        """The joined batch's gradient of the output."""
        with torch.no_grad():
            shape = self.model().eval()(self.images(draw)).shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(-1 - draw), dtype=torch.float64)

    def fused(self) -> nn.Module:
        """Ours, with synchronised batch norms."""
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        stock = self.model().to(memory_format=LAYOUTS[self.layout])
        if self.converted_first:
            model = fuse(convert(stock), memory=self.memory, engine=self.engine)
        else:
            model = convert(fuse(stock, memory=self.memory, engine=self.engine))
        if self.state is not None:
            STATES[self.state](model)
        assert any(isinstance(m, Fused) for m in model.modules())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        return model

    def run(self, rank: int) -> list[Outcome]:
        """One training step on this rank's part of every draw."""
        outcomes, fused = [], self.fused()
        for draw in range(self.draws):
            model: Any = copy.deepcopy(fused)
            if self.compiled:
                model = torch.compile(model, backend="aot_eager", fullgraph=True)
            x = share(self.images(draw).contiguous(memory_format=LAYOUTS[self.layout]), self.batches, rank)
            outcome = step(model, x, share(self.gradient(draw), self.batches, rank))
            outcomes.append({name.replace("_orig_mod.", ""): value for name, value in outcome.items()})
        return outcomes


WIDE = torch.float64
CASES: dict[str, Case] = {
    **{f"{net}-empty": Case(net, EMPTY) for net in NETS},
    **{f"{net}-uneven": Case(net, UNEVEN) for net in ("basic", "trunk")},
    **{f"{net}-fp32": Case(net, UNEVEN, torch.float32) for net in ("basic-projection", "stage")},
    **{f"basic-projection-{memory}": Case("basic-projection", EMPTY, memory=memory) for memory in ("lean", "min")},
    **{f"basic-projection-{state}": Case("basic-projection", state=state) for state in STATES},
    "bottleneck-reference": Case("bottleneck", EMPTY, engine="reference"),
    "bottleneck-nchw": Case("bottleneck", layout="nchw"),
    "basic-one-value-each": Case("basic", ONE_EACH, torch.float32, size=(1, 1)),
    "basic-one-value-on-one": Case("basic", EMPTY, torch.float32, size=(1, 1)),
    "trunk-converted-first": Case("trunk", converted_first=True),
}
MORE_CASES: dict[str, Case] = {
    **{
        f"{net}-{dtype}-{batches}".replace("torch.", ""): Case(net, batches, dtype)
        for net in NETS
        for dtype in (torch.float32, torch.bfloat16)
        for batches in (UNEVEN, EMPTY)
    },
    **{f"{net}-reference": Case(net, EMPTY, torch.float32, engine="reference", more=4) for net in NETS},
    **{f"stage-{memory}": Case("stage", dtype=torch.float32, memory=memory) for memory in ("lean", "min")},
    **{f"{net}-compiled": Case(net, EMPTY, compiled=True) for net in ("basic", "basic-projection", "trunk")},
    "stem-compiled-reference": Case("stem", engine="reference", compiled=True),
}


TRITON_CASES: dict[str, Case] = {
    "triton-bottleneck": Case("bottleneck-8", EMPTY, torch.float32, engine="triton", size=(5, 4)),
    "triton-basic-min": Case("basic", EMPTY, torch.float32, engine="triton", memory="min", size=(5, 4)),
}


class Collectives(TorchDispatchMode):
    """The names of the collectives that are started in the block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        if operator.namespace in ("_c10d_functional", "c10d") and name != "wait_tensor":
            self.names.append(name)
        return operator(*args, **(kwargs or {}))


@contextlib.contextmanager
def _error(into: dict[str, Any], name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:
        into[name] = f"{type(error).__name__}: {error}"


def _counted(memory: str, mode: str) -> dict[str, list[str]]:
    """The collectives of a step of a stage with ten batch norms, in both directions."""
    model = Case("stage", memory=memory).fused()
    model.train(mode == "train")
    with Collectives() as forward:
        out = model(torch.ones(2, 8, 7, 6, dtype=WIDE).requires_grad_())
    with Collectives() as backward:
        out.sum().backward()
    return {"forward": forward.names, "backward": backward.names}


def _in_subgroups(rank: int) -> Outcome:
    """A step of a block whose batch norms are synchronised in groups: ranks 0 and 1, and rank 2 alone."""
    case = Case("bottleneck")
    groups = [torch.distributed.new_group(members) for members in ([0, 1], [2])]
    model = case.fused()
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.process_group = groups[rank == 2]
    return step(model, share(case.images(0), UNEVEN, rank), share(case.gradient(0), UNEVEN, rank))


def _mixed(rank: int) -> Outcome:
    """A step of a block whose first batch norm is synchronised and whose second is not."""
    case = Case("basic")
    model = fuse(case.model())
    model.bn1 = nn.SyncBatchNorm.convert_sync_batchnorm(model.bn1)
    return step(model, share(case.images(0), UNEVEN, rank), share(case.gradient(0), UNEVEN, rank))


def traces_chains() -> bool:
    """Whether torch.compile sees the chain, and not the stock modules, which refuse a CPU."""
    try:
        need_a_traced_chain()
    except pytest.skip.Exception:
        return False
    return True


def more_cases_on(rank: int) -> dict[str, Any]:
    """The cases of the full suite."""
    cases = {name: case for name, case in MORE_CASES.items() if not case.compiled or traces_chains()}
    return {"cases": {name: case.run(rank) for name, case in cases.items()}}


def triton_cases_on(rank: int) -> dict[str, Any]:
    """The cases of the Triton engine, each launch executed as PTX; and which kernels ran."""
    from .engine_harness import running

    torch.backends.cudnn.allow_tf32 = False
    with running("own") as launches:
        cases = {name: case.run(rank) for name, case in TRITON_CASES.items()}
    return {"cases": cases, "kernels": {launch.kernel for launch in launches}}


def rank_sees(rank: int) -> dict[str, Any]:
    """Everything, in an order that is the same on all ranks."""
    seen: dict[str, Any] = {"cases": {name: case.run(rank) for name, case in CASES.items()}}
    seen["counted"] = {f"{memory} train": _counted(memory, "train") for memory in ("speed", "lean", "min")}
    seen["counted"]["speed eval"] = _counted("speed", "eval")
    seen["subgroups"], seen["mixed"] = _in_subgroups(rank), _mixed(rank)
    model = Case("basic").fused()
    before = copy.deepcopy(model.state_dict())
    with _error(seen, "one value in all"):
        model(torch.ones(int(rank == 0), 8, 1, 1, dtype=WIDE))
    seen["unmoved"] = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with _error(seen, "stock"):
        resnet_fused.unfuse(Case("basic").fused())(torch.ones(2, 8, 7, 6, dtype=WIDE))
    if rank == 0:  # whoever waits for others here waits for ever
        with Collectives() as probing:
            written = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(Written(8)))
        seen["probing"] = probing.names, isinstance(written, Fused)
        trained = Case("trunk").fused()
        seen["explained"] = [(record.fused, record.reason) for record in resnet_fused.explain(trained).blocks]
        seen["sites"] = len(resnet_fused.explain(trained, torch.ones(2, 3, 7, 6, dtype=WIDE)).sites)
    return seen
