"""Activation checkpointing: a batch is counted once though its forward runs twice. (Stock PyTorch counts it twice.)"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import resnet_fused
from resnet_fused import explain, fuse
from resnet_fused.modules import FusedBlock
from tests.stack_cases import gradients, identical, images, pair, same, stage, state


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """The classes' forwards are shared, and a function is compiled for a limited number of settings."""
    torch.compiler.reset()


Forward = Callable[[nn.Sequential, Tensor], Tensor]
WAYS: dict[str, Forward] = {
    "non-reentrant": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "reentrant": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "block by block": lambda m, x: checkpoint(m[1], checkpoint(m[0], x, use_reentrant=False), use_reentrant=False),
    "nested": lambda m, x: checkpoint(lambda y: m[1](checkpoint(m[0], y, use_reentrant=False)), x, use_reentrant=False),
    "nested, reentrant": lambda m, x: checkpoint(
        lambda y: m[1](checkpoint(m[0], y, use_reentrant=True)), x, use_reentrant=True
    ),
    "sequential": lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=False),
}


def outcome(model: nn.Sequential, forward: Forward) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The input's gradient, the parameters' and the state after one step."""
    x = images().requires_grad_()
    forward(model, x).square().sum().backward()
    assert x.grad is not None
    return x.grad, gradients(model), state(model)


@pytest.mark.parametrize("memory", ["speed", "min"])
@pytest.mark.parametrize("way", WAYS)
def test_a_recomputed_batch_is_counted_once(way: str, memory: str) -> None:
    model = fuse(stage().double(), memory=memory)
    plain = outcome(copy.deepcopy(model), lambda m, x: m(x))
    dx, grads, after = outcome(model, WAYS[way])
    same(dx, plain[0])
    same(grads, plain[1])
    identical(after, plain[2])


@pytest.mark.parametrize("saved", ["aten.convolution", "resnet_fused.site_fwd"])
def test_selective_checkpointing(saved: str) -> None:
    if not hasattr(torch.ops.resnet_fused, "site_fwd"):
        pytest.skip("the CPU library is not built")
    namespace, name = saved.split(".")
    keep = [getattr(getattr(torch.ops, namespace), name).default]
    context = functools.partial(create_selective_checkpoint_contexts, keep)
    model = pair()["fused"]
    plain = outcome(copy.deepcopy(model), lambda m, x: m(x))
    got = outcome(model, lambda m, x: checkpoint(m, x, use_reentrant=False, context_fn=context))
    same(got[1], plain[1])
    identical(got[2], plain[2])


def test_blocks_wrapped_for_checkpointing() -> None:
    """As FSDP users do it: the wrapper takes the block's place in its stage."""
    model = pair()["fused"]
    plain = outcome(copy.deepcopy(model), lambda m, x: m(x))
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, FusedBlock))
    assert isinstance(model[0], CheckpointWrapper)
    got = outcome(model, lambda m, x: m(x))
    same(list(got[1].values()), list(plain[1].values()))
    assert model[0].bn1.num_batches_tracked == 1


@pytest.mark.parametrize("owner", ["block", "stage"])
def test_a_forward_wrapped_on_the_instance_is_called(owner: str) -> None:
    """As toolboxes turn it on, ``module.forward = wrap(module.forward)``: a trunk must not step around it."""
    torch.manual_seed(0)
    model = fuse(resnet_fused.cifar_resnet(14, fused=False).double())
    twin = copy.deepcopy(model)
    module = model.layer2 if owner == "stage" else model.layer2[1]
    inner, calls = module.forward, []

    def forward(x: Tensor) -> Tensor:
        calls.append(torch._C._current_graph_task_id() != -1)
        return inner(x)

    module.forward = lambda x: checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]
    extents = {record.name: record.plan.extent for record in explain(model).blocks if record.plan}
    assert extents.get("layer2.1") == ("stage" if owner == "stage" else None) and extents["layer1.0"] == "trunk"
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for net in (model, twin):
        net(x).square().sum().backward()
    assert calls == [False, True]
    same(gradients(model), gradients(twin))
    identical(state(model), state(twin))


def test_stock_counts_it_twice() -> None:
    """What is documented as a difference; the gradients are the same."""
    stock, fused = (outcome(model, WAYS["non-reentrant"]) for model in pair().values())
    same(fused[0], stock[0])
    same(fused[1], stock[1])
    assert (stock[2]["0.bn1.num_batches_tracked"], fused[2]["0.bn1.num_batches_tracked"]) == (2, 1)


@pytest.mark.parametrize("way", ["non-reentrant", "reentrant"])
def test_a_cumulative_average_and_an_eval_norm(way: str) -> None:
    model = fuse(stage().double())
    model[0].bn1.momentum = None
    model[1].bn2.eval()
    plain = outcome(copy.deepcopy(model), lambda m, x: m(x))
    got = outcome(model, WAYS[way])
    same(got[1], plain[1])
    identical(got[2], plain[2])


def test_recomputed_under_autocast_with_dropout_between() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(fuse(stage()), nn.Dropout(0.5))
    twin = copy.deepcopy(model)
    found = []
    for net, forward in ((model, WAYS["non-reentrant"]), (twin, lambda m, x: m(x))):
        x = images().float().requires_grad_()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(net, x)
        out.float().square().sum().backward()
        found.append((gradients(net), state(net)))
    identical(found[0][0], found[1][0])
    identical(found[0][1], found[1][1])


def test_two_steps_count_two_batches() -> None:
    model = pair()["fused"]
    for _ in range(2):
        outcome(model, WAYS["reentrant"])
    assert model[0].bn1.num_batches_tracked == 2


@pytest.mark.parametrize("kind", [pytest.param("stock", marks=pytest.mark.full), "fused"])
def test_checkpointed_inside_torch_compile(kind: str) -> None:
    """The compiler moves a buffer once, stock's too; ours is held to the same."""
    model = pair()[kind]
    plain = outcome(copy.deepcopy(model), lambda m, x: m(x))
    compiled = torch.compile(lambda m, x: checkpoint(m, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    got = outcome(model, compiled)
    same(got[0], plain[0])
    same(got[1], plain[1])
    same(got[2], plain[2])


@pytest.mark.full
def test_a_compiled_model_inside_a_checkpoint_is_as_stock() -> None:
    """Compiled code cannot see that it is run again: it counts twice, stock's and ours alike."""
    counts = []
    for model in pair().values():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        outcome(model, lambda m, x, run=compiled: checkpoint(run, x, use_reentrant=False))  # type: ignore[misc]
        counts.append(model[0].bn1.num_batches_tracked.item())
    assert counts == [2, 2]
