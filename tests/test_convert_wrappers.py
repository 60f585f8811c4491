"""What stands around a state dict and `convert` takes off: prefixes, entries of a checkpoint, a detector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fused import ConversionError, convert
from resnet_fused.eager import BasicBlock, ResNet
from tests.test_convert_refusals import net


def test_a_detectors_backbone_by_pattern_and_by_prefix():
    detector = {**convert(net(), dst="mmdet", drop="fc"), "neck.conv.weight": torch.empty(1), "rpn.w": torch.empty(1)}
    by_pattern, report = convert(detector, drop=("neck.*", "rpn.*"), return_report=True)
    assert report.src == "mmpretrain" and "mmdet" in report.also
    by_prefix, report = convert(detector, src_prefix="backbone.", return_report=True)
    assert report.src == "torchvision" and report.dropped["rpn.w"] == "not under 'backbone.'"
    assert list(by_pattern) == list(by_prefix) == list(net(num_classes=None))
    assert {*report.keys} | {*report.dropped} == {*detector}


def test_the_destinations_prefix():
    assert next(iter(convert(net(num_classes=None), dst="detectron2", dst_prefix=""))) == "stem.conv1.weight"
    assert next(iter(convert(net(num_classes=None), dst="mmdet", dst_prefix=""))) == "conv1.weight"
    assert [*convert(net(), dst_prefix="teacher.")][-1] == "teacher.fc.bias"
    assert [*convert(net(), dst="mmpretrain", dst_prefix="")][-1] == "head.fc.bias"


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.net.", "model._orig_mod."],
)
def test_prefixes_of_wrappers(prefix):
    wrapped = {prefix + key: value for key, value in net().items()}
    there, report = convert(wrapped, return_report=True)
    assert list(there) == list(net()) and list(report.keys) == list(wrapped)
    assert {part + "." for part in prefix.split(".") if part} == {w.rstrip(".") + "." for w in report.wrappers}


def test_real_wrappers():
    model = ResNet(BasicBlock, (1, 1), planes=(8, 16), num_classes=5)
    expected = list(model.state_dict())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    there, report = convert(averaged.state_dict(), return_report=True)
    assert list(there) == expected and report.dropped == {"n_averaged": "the averaged model's own count"}
    assert list(convert(nn.DataParallel(model).state_dict())) == expected
    assert list(convert(torch.compile(model).state_dict())) == expected
    model.layer1.compile()
    model.layer1[0] = torch.compile(model.layer1[0])
    assert list(convert(model.state_dict())) == expected


def test_two_keys_that_differ_by_wrappers_only():
    source = {**net(), "layer1._orig_mod.0.conv1.weight": torch.empty(1)}
    with pytest.raises(ConversionError, match=r"layer1.0.conv1.weight and layer1._orig_mod.0.conv1.weight are both"):
        convert(source)


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "state_dict_ema", "net"])
def test_nested_checkpoints(entry):
    there, report = convert({"epoch": 3, entry: net(), "optimizer": {}}, return_report=True)
    assert list(there) == list(net()) and f"entry {entry}" in report.wrappers


def test_nested_twice_and_two_state_dicts():
    other = net(num_classes=None)
    checkpoint = {"model": {"state_dict": {"module." + k: v for k, v in net().items()}}, "state_dict_ema": other}
    there, report = convert(checkpoint, return_report=True)
    assert list(there) == list(net()) and report.wrappers == ("entry model", "entry state_dict", "module.")
    assert report.notes == ("the checkpoint also has state_dict_ema; entry='state_dict_ema' takes it instead",)
    assert list(convert(checkpoint, entry="state_dict_ema")) == list(other)
    with pytest.raises(ConversionError, match=r"entry: expected a mapping at 'ema', got keys \['model'"):
        convert(checkpoint, entry="ema")
    assert list(convert({"model": {"name": "resnet18"}, "net": net()})) == list(net())


def test_entries_that_are_no_tensors():
    with pytest.raises(ConversionError, match="torchvision has no meaning for 1 keys: epoch"):
        convert({**net(), "epoch": 3}, "torchvision")
    assert list(convert({**net(), "epoch": 3}, drop="epoch")) == list(net())
