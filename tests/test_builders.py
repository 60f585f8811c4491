"""The builders' arguments: weights, errors, `fuse` by default."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn

from resnet_fused import eager
from tests.test_family import on_meta, state_equal

resnet = importlib.import_module("resnet_fused.resnet")  # as an attribute of the package it is the builder


@pytest.fixture
def models():
    return pytest.importorskip("torchvision.models", reason="torchvision is an optional extra")


@pytest.mark.parametrize("weights", ["IMAGENET1K_V2", "DEFAULT", "ResNet50_Weights.IMAGENET1K_V2", "enum"])
def test_weights_are_torchvisions(weights, models, monkeypatch):
    """Loading is torchvision's own; here its file is stood in for by a fresh net's tensors."""
    stored = on_meta(models.resnet50).to_empty(device="cpu")
    for tensor in stored.state_dict().values():
        tensor.fill_(0.5 if tensor.is_floating_point() else 3)
    asked = []

    def get_state_dict(member, *args, **kwargs):
        asked.append((member, kwargs))
        return stored.state_dict()

    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", get_state_dict)
    given = models.ResNet50_Weights.IMAGENET1K_V2 if weights == "enum" else weights
    model = resnet.resnet50(weights=given, progress=False, num_classes=1000, fused=False)
    assert state_equal(model, stored)
    assert asked == [(models.ResNet50_Weights.IMAGENET1K_V2, {"progress": False, "check_hash": True})]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": "V3"}, ValueError, "resnet50: weights: expected one of .*IMAGENET1K_V1.*got 'V3'"),
        ({"weights": "DEFAULT", "num_classes": 10}, ValueError, "num_classes: expected 1000 with weights.*got 10"),
        ({"weights": "DEFAULT", "in_channels": 1}, ValueError, "in_channels: expected 3 with weights.*got 1"),
        ({"weights": 3}, TypeError, "expected ResNet50_Weights but received int"),
    ],
)
def test_weights_errors(options, error, words, models):
    with pytest.raises(error, match=words):
        resnet.resnet50(fused=False, **options)


def test_weights_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="resnet50: weights: 'DEFAULT' needs torchvision"):
        resnet.resnet50(weights="DEFAULT", fused=False)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: resnet.resnext50_32x4d(groups=1), "resnext50_32x4d: groups: expected 32, got 1"),
        (lambda: resnet.resnet(20), r"resnet: depth: expected one of \(18, 34, .*got 20"),
        (lambda: resnet.resnet(50, None), "resnet: depth: expected 18 or 34 with shortcut=None .*got 50"),
        (lambda: resnet.resnet(18, "D"), r"shortcut: expected one of \('A', 'A-sym', 'B', 'C'\), got 'D'"),
        (lambda: resnet.resnet(18, stride_in="5x5"), r"stride_in: expected one of \('3x3', '1x1'\), got '5x5'"),
        (lambda: resnet.cifar_resnet(21), r"cifar_resnet: depth: expected 6n \+ 2 .*got 21"),
        (lambda: resnet.cifar_resnet(2), r"cifar_resnet: depth: expected 6n \+ 2 .*got 2"),
        (lambda: resnet.plain(19), r"plain: depth: expected 18 or 34 .*got 19"),
        (lambda: resnet.plain(18, zero_init_residual=True), "zero_init_residual: expected False for a plain net"),
        (lambda: resnet.from_stages([1], [8], stride_rule="x"), "stride_rule: expected 'paper' or 'labml', got 'x'"),
        (lambda: resnet.from_stages([1, 1], [8]), r"n_channels: expected 2 values, as in n_blocks, got \[8\]"),
        (lambda: resnet.from_stages([1], [8], [4, 4]), "bottlenecks: expected 1 values, as in n_blocks"),
        (lambda: resnet.from_stages([], []), "n_channels: expected"),
        (lambda: resnet.resnet50(replace_stride_with_dilation=[True]), "None or a 3-element tuple, got"),
        (lambda: eager.ResNet(eager.BasicBlock, [1, 1], strides=[1]), "strides: expected 2 values"),
        (lambda: eager.ResNet(eager.BasicBlock, [1, 0]), r"layers: expected at least one stage .*got \[1, 0\]"),
        (lambda: eager.ResNet(eager.BasicBlock, [1], out_channels=[8]), "out_channels: expected None with BasicBlock"),
        (lambda: eager.Bottleneck(8, 8, stride_in="7x7"), "Bottleneck: stride_in: expected one of"),
        (lambda: eager.BasicBlock(8, 8, groups=2), "groups=1 and base_width=64, got groups=2"),
        (lambda: eager.PlainBlock(8, 8, 1, nn.Identity()), "PlainBlock: downsample: expected None, got Identity"),
        (lambda: eager.PadShortcut(2, -1, 8), "PadShortcut: stride, channel_offset: .*got 2 and -1"),
        (lambda: eager.PadShortcut(2, 4, 8)(torch.ones(1, 5, 2, 2)), "out_channels: expected at least 9 .*got 8"),
    ],
)
def test_errors(build, words):
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        build()


def test_dilated_basic_block_is_refused_as_in_torchvision():
    with pytest.raises(NotImplementedError, match="not supported in BasicBlock, got dilation=2"):
        resnet.resnet18(replace_stride_with_dilation=[False, False, True], fused=False)


def test_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="classes"):
        resnet.cifar_resnet(8, classes=3)


@pytest.mark.parametrize("name", resnet.BUILDERS)
def test_every_builder_takes_the_common_options(name):
    model = on_meta(resnet.BUILDERS[name], fused=False, num_classes=3, in_channels=4)
    assert model(torch.empty(2, 4, 64, 64, device="meta")).shape == (2, 3)


def test_builders_fuse_unless_told_not_to(monkeypatch):
    asked = []

    def fuse(model, *, memory):
        asked.append((type(model), memory))
        return model

    monkeypatch.setattr(importlib.import_module("resnet_fused.fuse"), "fuse", fuse)
    resnet.cifar_resnet(8)
    resnet.plain(20, memory="lean")
    resnet.resnet18(memory="min")
    resnet.cifar_resnet(8, fused=False)
    assert asked == [(eager.ResNet, memory) for memory in ("speed", "lean", "min")]


def test_fused_nets_keep_keys_and_checkpoints():
    stock, fused = resnet.cifar_resnet(8, "B", fused=False), resnet.cifar_resnet(8, "B")
    assert list(stock.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(fused.state_dict(), strict=True)
