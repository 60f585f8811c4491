"""Mixed precision: dtypes, the gradient scaler's view of Inf, and statistics that survive a skipped step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import eager_blocks as eager
from resnet_fused import fuse, protected_statistics
from tests.harness import hold_to_law
from tests.stack_cases import NoHostSync, Results, Sum, gradients, identical, images, pair, state

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLOCKS: dict[str, Callable[[], nn.Module]] = {"in place": lambda: eager.BasicBlock(8, 8), "out of place": Sum}


@pytest.mark.parametrize("amp", LOW)
@pytest.mark.parametrize("name", BLOCKS)
def test_an_add_has_the_dtype_of_the_stock_one(name: str, amp: str) -> None:
    found = {}
    for given in (torch.float32, LOW[amp]):
        for kind, model in (("stock", BLOCKS[name]()), ("fused", fuse(BLOCKS[name]()))):
            x = images().to(given).requires_grad_()
            with torch.autocast("cpu", LOW[amp]):
                out = model(x)
            out.sum().backward()
            found[kind, given] = out.dtype, x.grad.dtype, {p.grad.dtype for p in model.parameters()}
    assert all(found["stock", given] == found["fused", given] for given in (torch.float32, LOW[amp]))
    assert found["fused", torch.float32][0] == (torch.float32 if name == "out of place" else LOW[amp])


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_in_half_precision(name: str) -> None:
    hold_to_law(BLOCKS[name](), images(dtype=torch.float32), torch.float16, autocast=True)


Steps = list[tuple[float, Results, Results]]


def train(
    model: nn.Module, batches: list[torch.Tensor], guard: protected_statistics | None = None, watch: bool = False
) -> Steps:
    """A training loop in float16; per step the scale, the parameters and the buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    history: Steps = []
    for x in batches:
        optimizer.zero_grad()
        if guard is not None:
            guard.__enter__()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        if guard is None:
            scaler.step(optimizer)
        else:
            guard.step(scaler, optimizer)
        scaler.update()
        if guard is not None:
            with NoHostSync():
                guard.__exit__(None, None, None)
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        history.append((scaler.get_scale(), parameters, {n: b.clone() for n, b in model.named_buffers()}))
    return history


def batches() -> list[torch.Tensor]:
    """The second overflows in float16."""
    first, second, third = (images(seed, dtype=torch.float32) for seed in range(3))
    return [first, second * 1e5, third]


@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_the_scaler_sees_an_overflow_and_skips(kind: str) -> None:
    scales, parameters, buffers = zip(*train(pair(torch.float32)[kind], batches()))
    assert scales == (8.0, 4.0, 4.0)
    identical(parameters[1], parameters[0])
    assert not all(p.equal(parameters[1][name]) for name, p in parameters[2].items())
    assert not buffers[2]["0.bn1.running_mean"].isfinite().all()  # poisoned for good, as in stock PyTorch


@pytest.mark.parametrize("kind", ["stock", "fused"])
def test_a_skipped_step_leaves_protected_statistics_as_they_were(kind: str) -> None:
    model = pair(torch.float32)[kind]
    twin = copy.deepcopy(model)
    _, _, buffers = zip(*train(model, batches(), protected_statistics(model)))
    identical(buffers[1], buffers[0])
    first, _, third = batches()
    expected = train(twin, [first, third])
    identical(buffers[2], expected[1][2])  # as if the batch had never come


def test_protection_changes_nothing_where_no_step_is_skipped() -> None:
    model, given = pair(torch.float32)["fused"], batches()[::2]
    plain, guarded = train(copy.deepcopy(model), given), train(model, given, protected_statistics(model))
    for a, b in zip(plain, guarded, strict=True):
        identical(a[1], b[1])
        identical(a[2], b[2])


def test_an_exception_and_a_wish_roll_back() -> None:
    model = pair()["fused"]
    before = state(model)
    with pytest.raises(ValueError, match="out of memory"), protected_statistics(model):
        model(images())
        raise ValueError("out of memory")
    identical(state(model), before)
    with protected_statistics(model) as guard:
        model(images())
        guard.roll_back()
    identical(state(model), before)
    with protected_statistics(model):
        model(images())
    assert model[0].bn1.num_batches_tracked == before["0.bn1.num_batches_tracked"] + 1


def test_one_of_two_optimizers_is_enough() -> None:
    model = pair(torch.float32)["fused"]
    before = {name: b.clone() for name, b in model.named_buffers()}
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1) for block in model]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with protected_statistics(model) as guard:
        scaler.scale(model(images(dtype=torch.float32)).sum()).backward()
        model[0].conv1.weight.grad[0] = float("inf")
        for optimizer in optimizers:
            guard.step(scaler, optimizer)
        scaler.update()
    identical({name: b.clone() for name, b in model.named_buffers()}, before)


def own_loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, given: list[torch.Tensor]
) -> list[dict[str, torch.Tensor]]:
    """Steps that the guard does not see."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    history = []
    for x in given:
        with protected_statistics(model, optimizer):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        history.append({name: b.clone() for name, b in model.named_buffers()})
    return history


@pytest.mark.parametrize("fused", [False, True], ids=["skipped on the host", "skipped by the optimizer"])
def test_watched_optimizers_need_no_step_of_the_guard(fused: bool) -> None:
    model = pair(torch.float32)["fused"]
    before = {name: b.clone() for name, b in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    first, second, third = own_loop(model, optimizer, batches())
    assert not first["0.bn1.running_mean"].equal(before["0.bn1.running_mean"])
    identical(second, first)
    assert third["0.bn1.running_mean"].isfinite().all()
    assert third["0.bn1.num_batches_tracked"] == 2
    assert not optimizer._optimizer_step_post_hooks


def test_a_scaler_that_is_off_skips_nothing() -> None:
    model = pair(torch.float32)["fused"]
    scaler, optimizer = torch.amp.GradScaler("cpu", enabled=False), torch.optim.SGD(model.parameters(), lr=0.1)
    with protected_statistics(model) as guard:
        scaler.scale(model(images(dtype=torch.float32)).sum()).backward()
        guard.step(scaler, optimizer)
    assert model[0].bn1.num_batches_tracked == 1 and gradients(model)


def test_protection_refuses_in_words() -> None:
    with pytest.raises(TypeError, match=r"protected_statistics: model: expected a torch\.nn\.Module, got int"):
        protected_statistics(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizers: expected torch\.optim\.Optimizer, got GradScaler"):
        protected_statistics(nn.ReLU(), torch.amp.GradScaler("cpu"))  # type: ignore[arg-type]
    guard = resnet_fused.protected_statistics(pair()["fused"])
    with pytest.raises(RuntimeError, match="roll_back: expected a call inside the with block, got one outside"):
        guard.roll_back()
    with guard, pytest.raises(RuntimeError, match="expected a block that is not entered yet"):
        guard.__enter__()
