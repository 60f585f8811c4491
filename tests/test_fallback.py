"""What a fused model must not run fused: hooks, replaced children, subclasses. It runs as it was written."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import eager_blocks as eager
from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules import FusedStage

from .harness import step
from .test_fuse import X, _same, _small


def _hooked(model: nn.Module, where: str) -> list[str]:
    calls: list[str] = []
    model.get_submodule(where).register_forward_hook(lambda *_: calls.append(where))
    return calls


@pytest.mark.parametrize(
    "where",
    [
        "conv1",
        "maxpool",
        "layer1.0.conv2",
        "layer2.0.downsample.1",
        "layer3.1.relu",
        "layer2",
        "layer2.1",
        "layer4.0.downsample",
    ],
)
def test_hooks_fire_as_often_as_in_the_stock_model(where: str) -> None:
    stock, model = _small().double(), fuse(_small().double())
    expected, calls = _hooked(stock, where), _hooked(model, where)
    ref = step(stock, X.double())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = step(model, X.double())
        model(X.double())
    assert calls == expected * 2 and expected
    notices = [w for w in caught if "hook on" in str(w.message)]
    assert len(notices) == (1 if where.count(".") > 1 else 0)
    _same(got, ref)


def test_backward_hooks_on_inner_modules_fire() -> None:
    model = fuse(_small())
    seen: list[tuple[int, ...]] = []
    model.layer1[0].conv1.register_full_backward_hook(lambda m, gi, go: seen.append(tuple(go[0].shape)))
    with pytest.warns(UserWarning, match="hook on conv1"):
        model(X).sum().backward()
    assert seen == [(2, 64, 9, 9)]


def test_a_replaced_child_is_never_ignored() -> None:
    block = fuse(eager.BasicBlock(4, 4))
    twin = copy.deepcopy(unfuse(copy.deepcopy(block)))
    for b in (block, twin):
        b.relu = nn.GELU()  # type: ignore[assignment]
        b.conv2 = nn.Conv2d(4, 4, 5, padding=2)
    x = torch.randn(2, 4, 6, 6)
    twin.load_state_dict(block.state_dict())
    with pytest.warns(UserWarning, match="relu is now a GELU; call fuse again"):
        torch.testing.assert_close(block(x), twin(x))


def test_a_shortcut_added_later_is_never_ignored() -> None:
    block = fuse(eager.BasicBlock(4, 4))
    block.downsample = nn.Conv2d(4, 4, 1)
    with pytest.warns(UserWarning, match="downsample was added or removed; call fuse again"):
        torch.testing.assert_close(block(torch.ones(2, 4, 6, 6)), unfuse(copy.deepcopy(block))(torch.ones(2, 4, 6, 6)))


def test_a_subclass_with_its_own_forward_is_called() -> None:
    class Scaled(resnet_fused.BasicBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 3.0

    torch.manual_seed(0)
    stage = fuse(nn.Sequential(resnet_fused.BasicBlock(4, 4), resnet_fused.BasicBlock(4, 4), Scaled(4, 4)))
    assert isinstance(stage, FusedStage)
    x = torch.randn(2, 4, 6, 6)
    want = x
    for block in copy.deepcopy(stage):
        want = block(want)
    torch.testing.assert_close(stage(x), want)
    assert [type(m) for m in unfuse(stage)] == [eager.BasicBlock, eager.BasicBlock, Scaled]
    torch.testing.assert_close(stage(x), want)


def test_a_subclass_that_watches_its_forward_is_called_in_a_stage() -> None:
    calls: list[int] = []

    class Watched(resnet_fused.BasicBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(x)

    stage = fuse(nn.Sequential(resnet_fused.BasicBlock(4, 4), resnet_fused.BasicBlock(4, 4), Watched(4, 4)))
    calls.clear()
    stage(torch.randn(2, 4, 6, 6))
    assert calls == [1]


def test_sync_batch_norm_conversion_keeps_the_activation() -> None:
    stock = _small().double().eval()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(copy.deepcopy(stock)))
    assert isinstance(model.layer1[0].bn1, nn.SyncBatchNorm)
    assert all(record.fused and "SyncBatchNorm" in record.reason for record in explain(model).blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(X.double()), stock(X.double()))
