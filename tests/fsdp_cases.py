"""What each rank does for the tests of FSDP2: stock and fused networks, sharded in the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from resnet_fused import explain, fuse, site
from resnet_fused.modules import FusedBlock, FusedStage

from .harness import Outcome
from .ranks import share
from .sync_cases import Case

RANKS = 2
BATCHES = (2, 1)
RATE = 0.1
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)


def case(dtype: torch.dtype = torch.float64) -> Case:
    """The network, its images and their gradients."""
    return Case("trunk", BATCHES, dtype, layout="nchw", size=(13, 12))


def _convolutions(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


PARTS: dict[str, Any] = {
    "whole": lambda model: [],
    "blocks": lambda model: [block for stage in (model.layer1, model.layer2) for block in stage],
    "stages": lambda model: [model.layer1, model.layer2],
    "convolutions": _convolutions,
}


def sharded(net: nn.Module, parts: str, **options: Any) -> nn.Module:
    """The network with its parts and then itself sharded."""
    for part in PARTS[parts](net):
        fully_shard(part, **options)
    return fully_shard(net, **options)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def one_step(model: nn.Module, x: Tensor, dout: Tensor) -> tuple[Outcome, int]:
    """A step of SGD: output, whole gradients and the whole state after it; and how many sites ran in the backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    sites: list[str] = []
    with site.watched(lambda way, *arguments: sites.append(way)):
        out = model(x)
        out.backward(dout.to(out))
    outcome = {"output": out.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        outcome[f"{name}.grad"] = _whole(parameter.grad).detach().clone()
    optimizer.step()
    outcome.update((name, _whole(value).detach().clone()) for name, value in model.state_dict().items())
    return outcome, sites.count("backward")


def _run(rank: int, parts: str, fused: bool, memory: str = "speed") -> tuple[Outcome, int]:
    given = case()
    net = fuse(given.model(), memory=memory) if fused else given.model()
    x, dout = (share(t, BATCHES, rank) for t in (given.images(0), given.gradient(0)))
    return one_step(sharded(net, parts), x, dout)


def _mixed(rank: int) -> dict[str, Any]:
    """Parameters in bf16 for the step, by the policy: ours, and what stock says of it."""
    given = case(torch.float32)
    x, dout = (share(t, BATCHES, rank) for t in (given.images(0), given.gradient(0)))
    seen: dict[str, Any] = {"fused": one_step(sharded(fuse(given.model()), "blocks", mp_policy=POLICY), x, dout)}
    try:
        sharded(given.model(), "blocks", mp_policy=POLICY)(x)
    except RuntimeError as error:
        seen["stock"] = str(error)
    return seen


def _loaded(rank: int) -> bool:
    """Whether the state of a sharded fused network goes into a sharded stock one, and back."""
    ours, stock = sharded(fuse(case().model()), "blocks"), sharded(case().model(), "blocks")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 1.0
    stock.load_state_dict(ours.state_dict())
    state = {name: _whole(value) for name, value in stock.state_dict().items()}
    return all(torch.equal(_whole(value), state[name]) for name, value in ours.state_dict().items())


def _explained() -> dict[str, Any]:
    model = sharded(fuse(case().model()), "blocks")
    seen: dict[str, Any] = {"reasons": [(record.fused, record.reason) for record in explain(model).blocks]}
    seen["kinds"] = [isinstance(model.layer1[0], FusedBlock), isinstance(model.layer1, FusedStage)]
    try:
        fuse(sharded(case().model(), "whole"))
    except ValueError as error:
        seen["refused"] = str(error)
    return seen


def rank_sees(rank: int) -> dict[str, Any]:
    """Everything, in an order that is the same on all ranks."""
    seen: dict[str, Any] = {"fused": {}, "stock": {}}
    for parts in PARTS:
        seen["fused"][parts] = _run(rank, parts, True)
        seen["stock"][parts] = _run(rank, parts, False)
    for memory in ("lean", "min"):
        seen["fused"][memory] = _run(rank, "blocks", True, memory)
    seen["mixed"], seen["loaded"], seen["explained"] = _mixed(rank), _loaded(rank), _explained()
    return seen
