"""Transforms of torch.func, forward-mode AD, second derivatives, and the switch that turns fusing off."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import resnet_fused
from resnet_fused import eager_blocks as eager
from resnet_fused import fuse
from tests.harness import randomise
from tests.stack_cases import gradients, images, pair, same, state

REFUSED = r"resnet_fused: double backward is not supported by the fused path; use resnet_fused\.disable\(\)"


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    buffers = dict(model.named_buffers())
    return lambda parameters, x: functional_call(model, (parameters, buffers), (x,)).square().sum()


def dual(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Callable[[nn.Module, dict[str, Tensor], Tensor], Any]] = {
    "functional_call": lambda m, p, x: loss_of(m)(p, x),
    "grad": lambda m, p, x: grad(loss_of(m))(p, x),
    "grad of grad": lambda m, p, x: grad(lambda y: grad(loss_of(m), 1)(p, y).square().sum())(x),
    "jvp": lambda m, p, x: jvp(lambda y: loss_of(m)(p, y), (x,), (torch.ones_like(x),)),
    "vmap": lambda m, p, x: vmap(lambda y: m(y[None]))(x),
    "gradient of every sample": lambda m, p, x: vmap(grad(lambda q, y: loss_of(m)(q, y[None])), (None, 0))(p, x),
    "jacrev": lambda m, p, x: jacrev(lambda y: m(y).sum((0, 2, 3)))(x),
    "dual numbers": lambda m, p, x: dual(m, x),
    "jacobian": lambda m, p, x: torch.autograd.functional.jacobian(lambda y: m(y).sum((0, 2, 3)), x),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_the_stock_result(name: str) -> None:
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in pair().values():
            model.eval()
            parameters = {key: p.detach() for key, p in model.named_parameters()}
            found.append(TRANSFORMS[name](model, parameters, images()))
    same(found[1], found[0])
    notices = [str(w.message) for w in caught if "runs unfused" in str(w.message)]
    transformed = name not in ("functional_call", "jacobian")
    assert len(notices) == (2 if transformed else 0)  # one a block
    assert all("torch.func transform" in n or "forward-mode" in n for n in notices)


def test_batch_statistics_under_grad_are_refused_by_torch_as_ever() -> None:
    for model in pair().values():
        with pytest.raises(RuntimeError, match="in-place operation"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grad(loss_of(model))(dict(model.named_parameters()), images())


def test_functional_call_trains_with_the_tensors_it_is_given() -> None:
    """Stays fused, gradients reach the given tensors, buffers given move, the model's own do not."""
    found = []
    for model in pair().values():
        own = state(model)
        given = {key: (p.detach() * 2).requires_grad_() for key, p in model.named_parameters()}
        buffers = {key: b.clone() for key, b in model.named_buffers()}
        functional_call(model, (given, buffers), (images(),)).square().sum().backward()
        found.append(({key: p.grad for key, p in given.items()}, buffers))
        same(state(model), own)
        assert not gradients(model)
    same(found[1][0], found[0][0])
    same(found[1][1], found[0][1])


def second(model: nn.Module, through: str) -> Tensor:
    """A gradient penalty; the gradient that comes into the model does or does not depend on anything."""
    x = images().requires_grad_()
    out = model(x)
    loss = out.sum() if through == "linear loss" else out.square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), x, allow_unused=True)[0]


@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
@pytest.mark.parametrize("through", ["linear loss", "square loss"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_second_derivative_is_refused_and_right_when_disabled(through: str, training: bool, memory: str) -> None:
    stock = pair()["stock"].train(training)
    model = fuse(copy.deepcopy(stock), memory=memory)
    with pytest.raises(RuntimeError, match=REFUSED):
        second(model, through)
    with resnet_fused.disable():
        got = second(model, through)
    same(got, second(stock, through))


def test_a_projection_without_batch_norm_refuses_too() -> None:
    block = fuse(eager.BasicBlock(8, 12, 1, nn.Conv2d(8, 12, 1)).double())
    x = images().requires_grad_()
    (dw,) = torch.autograd.grad(block(x).sum(), block.downsample.weight, create_graph=True)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=REFUSED):
        dw.sum().backward()


def test_create_graph_alone_is_no_error() -> None:
    found = []
    for model in pair().values():
        x = images().requires_grad_()
        model(x).square().sum().backward(create_graph=True)
        assert x.grad is not None and x.grad.requires_grad
        found.append({**gradients(model), "x": x.grad.detach()})
        model.zero_grad()
    same(found[1], found[0])


def test_hessians_are_refused_never_wrong() -> None:
    model = pair()["fused"].eval()
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.functional.hessian(lambda x: model(x).square().sum(), images())


@pytest.mark.parametrize("way", ["is_grads_batched", "vectorize"])
def test_batched_gradients_are_refused_in_words(way: str) -> None:
    model = pair()["fused"].eval()

    def ask(net: nn.Module) -> Tensor:
        x = images().requires_grad_()
        if way == "vectorize":
            return torch.autograd.functional.jacobian(lambda y: net(y).sum((0, 2, 3)), x, vectorize=True)
        out = net(x).sum((0, 2, 3))
        return torch.autograd.grad(out, x, torch.eye(16, dtype=x.dtype), is_grads_batched=True)[0]

    with pytest.raises(RuntimeError, match=r"a backward over a batch of gradients .* use resnet_fused\.disable\(\)"):
        ask(model)
    with resnet_fused.disable():
        got = ask(model)
    same(got, ask(pair()["stock"].eval()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory", ["speed", "min"])
def test_gradcheck(memory: str, training: bool) -> None:
    torch.manual_seed(0)
    block = fuse(randomise(eager.BasicBlock(3, 3)).double().train(training), memory=memory)
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


def test_disable_as_a_decorator_nests_and_reaches_other_threads() -> None:
    block = fuse(eager.BasicBlock(8, 8)).double()
    seen: list[str] = []

    def node() -> None:
        seen.append(block(images().contiguous(memory_format=torch.channels_last)).grad_fn.name())

    disabled = resnet_fused.disable()(node)
    disabled()
    with resnet_fused.disable():
        with resnet_fused.disable():
            node()
        thread = threading.Thread(target=node)
        thread.start()
        thread.join()
    node()
    assert seen == ["ReluBackward0"] * 3 + ["ClosedSiteFunctionBackward"]
    with pytest.raises(ValueError, match="mine"), resnet_fused.disable():
        raise ValueError("mine")
    node()
    assert seen[-1] == "ClosedSiteFunctionBackward"
