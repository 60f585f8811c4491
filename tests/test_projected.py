"""A block's shortcut through the projection ops: where they run, the same numbers, and views that step over pixels."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from resnet_fused import fuse, plan, projected, projection
from resnet_fused.calls import SiteCall, Source, handed, unhanded
from resnet_fused.eager_blocks import BasicBlock, Bottleneck
from tests.harness import hold_to_law, randomise

CPU = projection.unavailable(torch.device("cpu"), torch.float32)
needs_ops = pytest.mark.skipif(CPU is not None, reason=f"the projection ops cannot run: {CPU}")


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    monkeypatch.setattr(plan, "SMALL_PRODUCT", 0)


def shortcut(block: type, channels: int, stride: int, bias: bool = False) -> nn.Module:
    made = block(channels, 8, stride, nn.Sequential(nn.Conv2d(channels, 8 * block.expansion, 1, stride, bias=bias)))
    made.downsample.append(nn.BatchNorm2d(8 * block.expansion))
    return randomise(made)


def called(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The projection ops that a training step calls."""
    names = []

    def note(name):
        genuine = getattr(projection, name)
        return mock.patch.object(projection, name, lambda *a: names.append(name) or genuine(*a))

    with note("projection_fwd"), note("projection_dgrad"), note("projection_wgrad"):
        model(x).sum().backward()
    return names


@needs_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stride", "size"), [(1, (5, 7)), (2, (7, 9)), (2, (8, 6)), (3, (7, 8))])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_the_ops_obey_the_law(block, stride, size, dtype):
    fused = hold_to_law(shortcut(block, 12, stride), torch.randn(2, 12, *size), dtype, engine="cpu")
    x = torch.randn(2, 12, *size).to(dtype).requires_grad_()
    assert sorted(called(fused, x)) == ["projection_dgrad", "projection_fwd", "projection_wgrad"]


@needs_ops
@pytest.mark.parametrize("freeze", [lambda m: m.eval(), lambda m: m.downsample[1].eval()], ids=["eval", "frozen"])
def test_running_statistics_and_a_bias(freeze):
    hold_to_law(
        shortcut(Bottleneck, 12, 2, True), torch.randn(2, 12, 7, 9), torch.float32, engine="cpu", prepare=freeze
    )


@needs_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_shortcut_without_batch_norm(bias, dtype):
    model = shortcut(BasicBlock, 12, 2)
    model.downsample = nn.Conv2d(12, 8, 1, 2, bias=bias)
    fused = hold_to_law(model, torch.randn(2, 12, 7, 9), dtype, engine="cpu")
    x = torch.randn(2, 12, 7, 9).to(dtype).requires_grad_()
    assert sorted(called(fused, x)) == ["projection_dgrad", "projection_fwd", "projection_wgrad"]
    fused.requires_grad_(False)
    assert sorted(called(fused, x)) == ["projection_dgrad", "projection_fwd"]


@needs_ops
@pytest.mark.parametrize("memory", ["lean", "min"])
def test_what_is_rebuilt_is_rebuilt_by_the_ops(memory):
    fused = hold_to_law(shortcut(Bottleneck, 12, 2), torch.randn(2, 12, 7, 9), torch.float32, memory=memory)
    names = called(fused, torch.randn(2, 12, 7, 9))
    assert names.count("projection_fwd") == (2 if memory == "min" else 1)


@needs_ops
def test_autocast_keeps_a_float32_gradient():
    model = shortcut(BasicBlock, 12, 2)
    hold_to_law(model, torch.randn(2, 12, 7, 9), torch.bfloat16, autocast=True)


def test_the_reference_and_a_forced_plan_do_without():
    x = torch.randn(2, 12, 7, 9)
    assert called(fuse(shortcut(BasicBlock, 12, 2), engine="reference"), x) == []
    with plan.force("library"):
        assert called(fuse(shortcut(BasicBlock, 12, 2)), x) == []


def test_a_machine_without_the_ops_does_without():
    x = torch.randn(2, 12, 7, 9)
    with mock.patch.object(projection, "unavailable", lambda *_: "not built"):
        assert called(fuse(shortcut(BasicBlock, 12, 2)), x) == []


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 5, 8, 6), (2, 3, 2, 2), (1, 1, 5, 5), (2, 4, 1, 1), (0, 4, 6, 6)])
def test_a_handed_view_is_traced_back(shape, stride):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    view = handed(x, stride)
    base, found = unhanded(view)
    assert torch.equal(handed(base, found), view)
    if found > 1:
        assert base.is_contiguous(memory_format=torch.channels_last)
        assert base.data_ptr() == x.data_ptr()
    elif min(shape[0], shape[1] - 1) > 0 and stride > 1 and min(shape[2:]) > stride:
        pytest.fail("a view that steps was not traced back")


def test_only_a_plain_pointwise_shortcut_runs_by_the_ops():
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(4, 8, 1, 1)
    call = SiteCall("cpu", (2, 2), (0, 0), (1, 1), 1, False, True, 0.1, 1e-5, projection=True)
    assert projected.runs(call, Source("plain", x), weight) == (CPU is None)
    for other in (call._replace(projection=False), call._replace(padding=(1, 1)), call._replace(groups=2)):
        assert not projected.runs(other, Source("plain", x), weight)
    assert not projected.runs(call, Source("plain", x), torch.randn(4, 8, 3, 3))
    assert not projected.runs(call, Source("pending", x), weight)
    assert not projected.runs(call, Source("plain", x.half()), weight.double())


@needs_ops
def test_a_small_shortcut_is_left_to_the_engine(monkeypatch):
    x = torch.randn(2, 12, 7, 9)
    products = 2 * 12 * 7 * 9 * 8
    for most, ops in ((products - 1, 3), (products, 0)):
        monkeypatch.setattr(plan, "SMALL_PRODUCT", most)
        for dtype, expected in ((torch.float32, ops), (torch.bfloat16, 3)):
            fused = hold_to_law(shortcut(BasicBlock, 12, 2), x, dtype, engine="cpu")
            assert len(called(fused, x.to(dtype).requires_grad_())) == expected
