"""What `convert` refuses, names, drops and warns of; wrappers and damaged state dicts."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import nn

from resnet_fused import ConversionError, convert
from resnet_fused.checkpoints import FORMATS
from resnet_fused.eager import BasicBlock, Bottleneck, ResNet, StemConfig
from tests.models import checkpoints as models


def net(block: type = BasicBlock, **options) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        options = {"num_classes": 5, **options}
        return ResNet(block, (1, 2), planes=(8, 16), stem=StemConfig(8), **options).state_dict()


def everywhere() -> list[tuple[str, dict[str, torch.Tensor]]]:
    """A small net in every format, basic or bottleneck."""
    found = []
    for i, name in enumerate(FORMATS):
        drop = ["fc"] if not any(layout.head for layout in FORMATS[name].layouts) else []
        drop += ["stem.norm", "shortcut.norm"] if name == "resnetl" else []
        source = net(Bottleneck if i % 2 else BasicBlock, bias=bool(FORMATS[name].biases))
        found.append((name, convert(source, "torchvision", name, drop=drop)))
    return found


EVERYWHERE = [pytest.param(name, source, id=name) for name, source in everywhere()]


@pytest.mark.parametrize(("name", "source"), EVERYWHERE)
def test_a_key_removed_is_named(name, source):
    keys = [*source]
    for key in sorted({*random.Random(0).sample(keys, 12), keys[0], keys[-1]}):
        damaged = {k: v for k, v in source.items() if k != key}
        with pytest.raises(ConversionError) as refusal:
            convert(damaged, name)
        assert f"{key} is missing" in str(refusal.value)


@pytest.mark.parametrize(("gone", "named"), [("layer2.0.", "layer2.0.conv1"), ("layer1.", "layer1.0.conv1")])
def test_a_block_or_a_stage_removed_is_named(gone, named):
    damaged = {key: value for key, value in net().items() if not key.startswith(gone)}
    with pytest.raises(ConversionError, match=f"torchvision: {named}.weight is missing"):
        convert(damaged)


def test_a_projection_removed_is_named_where_another_stands():
    with torch.device("meta"):
        source = ResNet(BasicBlock, (1, 1, 1), planes=(8, 16, 32), stem=StemConfig(8)).state_dict()
    damaged = {key: value for key, value in source.items() if not key.startswith("layer2.0.downsample.")}
    with pytest.raises(ConversionError, match=r"torchvision: layer2.0.downsample.0.weight is missing"):
        convert(damaged)


@pytest.mark.parametrize(("name", "source"), EVERYWHERE)
@pytest.mark.parametrize("extra", ["{0}.extra", "extra.weight", "extra", "{1}.weight2", "{1}.running_mean.weight"])
def test_a_key_added_is_named(name, source, extra):
    modules = [key.rpartition(".")[0] for key in source]
    extra = extra.format(modules[0], modules[-1])
    damaged = {**source, extra: torch.zeros(8, device="meta")}
    with pytest.raises(ConversionError, match=f"{name} has no meaning for 1 keys: {extra}"):
        convert(damaged, name)
    with pytest.raises(ConversionError, match=rf"no format reads all \d+ keys(.|\n)*1 not read: {extra}"):
        convert(damaged)
    with pytest.warns(UserWarning, match=f"left out, of unknown meaning: {extra}"):
        there, report = convert(damaged, name, name, strict=False, return_report=True)
    assert report.unknown == (extra,) and list(there) == list(source)
    assert f"left out, of unknown meaning: {extra}" in str(report)
    assert convert(damaged, name, name, drop=extra, return_report=True)[1].dropped == {extra: "asked for"}


def test_a_key_missing_is_announced_where_it_is_allowed():
    damaged = net()
    del damaged["layer2.1.bn2.bias"]
    there, report = convert(damaged, dst="transformers", strict=False, return_report=True)
    assert report.notes == ("layer2.1.bn2.bias is missing",) and len(there) == len(damaged)
    assert "note: layer2.1.bn2.bias is missing" in str(report)


def test_what_is_not_strict_still_finds_the_format():
    damaged = {**convert(net(), dst="transformers"), "extra": torch.empty(1)}
    with pytest.warns(UserWarning, match="left out, of unknown meaning: extra"):
        there, report = convert(damaged, strict=False, return_report=True)
    assert report.src == "transformers" and list(there) == list(net())
    with pytest.raises(ConversionError, match="no format reads all 1 keys"):
        convert({"extra": torch.empty(1)}, strict=False)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("layer1.0.bn1.weight", (9,), r"layer1.0.bn1.weight: expected 8 values, as layer1.0.conv1.weight, got 9"),
        ("layer2.0.conv1.weight", (16, 9, 3, 3), r"layer2.0.conv1.weight: expected 8 input channels, got 9"),
        ("layer2.0.downsample.0.weight", (16, 9, 1, 1), r"expected 8 to 16 channels, got 9 to 16"),
        ("fc.weight", (5, 17), r"fc.weight: expected 16 input features, got 17"),
        ("layer1.0.conv1.weight", (8, 8), r"layer1.0.conv1.weight: expected 4 dimensions, got shape \(8, 8\)"),
    ],
)
def test_shapes_that_do_not_fit(key, shape, words):
    with pytest.raises(ConversionError, match=words):
        convert({**net(), key: torch.empty(shape)}, "torchvision")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, r"expected tensors by name, or under one of .*, got keys \[\]"),
        ([1], "expected tensors by name.* got a list"),
        (nn.Linear(1, 1), r"expected a state dict, got a Linear: give its state_dict\(\)"),
        ({"epoch": 3}, r"got keys \['epoch'\]"),
        (nn.Linear(1, 1).state_dict(), r"none; it has weight, bias"),
        ({"features.0.weight": torch.empty(8, 3, 3, 3)}, r"no format reads all 1 keys(.|\n)*features.0.weight"),
        ({"fc.weight": torch.empty(5, 8), "fc.bias": torch.empty(5)}, "no format reads all 2 keys"),
    ],
)
def test_foreign_dicts(source, words):
    with pytest.raises(ConversionError, match=words):
        convert(source)


def test_a_net_without_blocks_is_none():
    with pytest.raises(ConversionError, match=r"torchvision reads no block of it; it has module.a, module.b"):
        convert({"module.a": torch.empty(1), "module.b": torch.empty(1)}, "torchvision")


def test_two_formats_that_disagree(monkeypatch):
    form = FORMATS["torchvision"]
    other = dataclasses.replace(form, name="swapped", block={**form.block, "norm1": "bn2", "norm2": "bn1"})
    monkeypatch.setitem(FORMATS, "swapped", other)
    with pytest.raises(ConversionError, match=r"each differently: torchvision, resnet_fused, timm, .*swapped.*; name"):
        convert(net())
    assert convert(net(), "torchvision")


def test_unknown_formats():
    for argument in ("src", "dst"):
        with pytest.raises(ConversionError, match=f"{argument}: expected one of .*'timm'.*, got 'tim'"):
            convert(net(), **{argument: "tim"})


@pytest.mark.parametrize(
    ("dst", "words", "ask"),
    [
        ("mmdet", "a classifier", "fc"),
        ("detectron2", "a classifier", "fc"),
        ("resnetl", "batch norms in shortcuts .*, the stem's batch norm", ("shortcut.norm", "stem.norm")),
    ],
)
def test_what_has_no_place_must_be_dropped_by_name(dst, words, ask):
    with pytest.raises(ConversionError) as refusal:
        convert(net(), dst=dst)
    assert refusal.match(f"dst: {dst} has no place for {words}") and f"drop={ask!r}" in str(refusal.value)
    there, report = convert(net(), dst=dst, drop=ask, return_report=True)
    asked = {key for key, reason in report.dropped.items() if reason == "asked for"}
    assert asked and len(there) + len(report.dropped) == len(net())
    assert {*report.keys} | {*report.dropped} == {*net()}


@pytest.mark.parametrize(
    ("architecture", "ask"),
    [("seresnet18", "se"), ("resnet50s", "stem"), ("resnetrs50", ("avgpool", "pool", "se", "stem"))],
)
def test_timm_variants_into_torchvision(architecture, ask):
    timm = pytest.importorskip("timm", reason="timm is not a dependency")
    with torch.device("meta"):
        source = timm.create_model(architecture).state_dict()
    with pytest.raises(ConversionError, match="torchvision has no"):
        convert(source)
    there = convert(source, drop=ask)
    assert "layer4.1.bn2.weight" in there and not any(".se." in key for key in there)


def test_averaging_shortcuts_are_no_matter_of_names():
    timm = pytest.importorskip("timm", reason="timm is not a dependency")
    with torch.device("meta"):
        source = timm.create_model("resnet26d").state_dict()
    with pytest.raises(ConversionError, match="torchvision has no shortcut that averages before its 1x1 convolution"):
        convert(source, drop="stem")
    there, report = convert(source, drop=("stem", "avgpool"), return_report=True)
    assert any("average pools are left out" in warning for warning in report.warnings)
    assert not any("average pools" in w for w in convert(source, dst="timm", return_report=True)[1].warnings)
    assert "layer2.0.downsample.0.weight" in there and "layer2.0.downsample.2.weight" not in there


def test_drop_words():
    with pytest.raises(ConversionError, match=r"drop: expected one of \('fc', .* got 'neck.\*'"):
        convert(net(), drop=("fc", "neck.*"))
    assert not any(key.startswith(("fc", "conv1", "bn1")) for key in convert(net(), drop=("fc", "stem")))
    assert not any(key.endswith("bias") and "conv" in key for key in convert(net(bias=True), drop="bias"))
    assert not any("downsample" in key for key in convert(net(), drop="shortcut"))


@pytest.mark.parametrize(
    ("src", "dst", "warns"),
    [
        ("detectron2", "torchvision", True),
        ("torchvision", "caffe", True),
        ("resnetl", "timm", True),
        ("sequences", "detectron2", False),
        ("detectron2", "resnet_fused", False),
        ("timm", "torchvision", False),
    ],
)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_the_stride_is_warned_of_where_there_is_a_choice(src, dst, warns, block):
    drop = ("fc", "stem.norm", "shortcut.norm") if "resnetl" in (src, dst) else ("fc",)
    source = convert(net(block), "torchvision", src, drop=drop)
    _, report = convert(source, src, dst, return_report=True)
    assert any("stride in their" in warning for warning in report.warnings) == (warns and block is Bottleneck)


def test_other_differences_are_warned_of():
    def warnings(src: str, dst: str, drop: tuple[str, ...] = ("fc",), **options) -> str:
        source = convert(net(**options), "torchvision", src, drop=drop)
        return str(convert(source, src, dst, return_report=True)[1])

    assert "expect BGR images, those in torchvision RGB" in warnings("caffe", "torchvision")
    assert "in the stem labml's own models have no ReLU, no pool" in warnings("labml", "torchvision")
    assert "torchvision's models have no biases in the convolutions" in warnings("labml", "torchvision", bias=True)
    assert "labml's models have biases in the convolutions, this net has no such" in warnings("kuangliu", "labml")
    assert "warning" not in warnings("timm", "torchvision")


def test_the_report_prints_every_class_of_key():
    _, report = convert(net(), dst="detectron2", drop="fc", return_report=True)
    text = str(report)
    assert "torchvision (read alike as resnet_fused, timm) to detectron2: " in text
    assert "left out, asked for: fc.weight, fc.bias" in text
    assert "left out, detectron2's batch norms have none: bn1.num_batches_tracked, " in text
    with torch.device("meta"):
        frozen = models.Detectron(False, (1,), 8).state_dict()
    assert "created, zero: bn1.num_batches_tracked" in str(convert(frozen, return_report=True)[1])
