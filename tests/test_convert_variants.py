"""`convert` by keys, continued: labml's flat blocks, timm's variants, nets of every size."""

from __future__ import annotations

import pytest
from torch import nn

from resnet_fused import ConversionError, convert
from resnet_fused.eager import BasicBlock, ResNet
from resnet_fused.resnet import cifar_resnet, from_stages
from tests.models import source_a, source_d
from tests.test_convert import meta


@pytest.mark.parametrize("rule", ["labml", "paper"])
@pytest.mark.parametrize("bottlenecks", [None, (8, 16, 16)])
def test_labml_stages_are_inferred_by_either_stride_rule(rule, bottlenecks):
    net = meta(source_a.ResNetBase, (3, 2, 4), (16, 32, 64), bottlenecks, stride_rule=rule)
    there, report = convert(net.state_dict(), return_report=True)
    assert report.stages == (3, 2, 4)
    expected = meta(from_stages, (3, 2, 4), (16, 32, 64), bottlenecks, stride_rule=rule, fused=False)
    assert list(there) == list(expected.state_dict())


def test_labml_stages_begin_at_a_projection_too():
    net = meta(source_a.ResNetBase, (2, 3), (16, 16), stride_rule="paper")
    assert convert(net.state_dict(), return_report=True)[1].stages == (2, 3)


def test_labml_stages_given():
    net = meta(source_a.ResNetBase, (2, 2), (16, 16), stride_rule="labml")
    assert convert(net.state_dict(), return_report=True)[1].stages == (4,)
    assert convert(net.state_dict(), stages=(2, 2), return_report=True)[1].stages == (2, 2)
    assert convert(net.state_dict(), "labml", stages=(1, 3), return_report=True)[1].stages == (1, 3)
    for src in (None, "labml"):
        with pytest.raises(ConversionError, match=r"stages: expected sizes that add up to 4 blocks, got \(3, 3\)"):
            convert(net.state_dict(), src, stages=(3, 3))
    with pytest.raises(ConversionError, match="stages: expected None, as torchvision names its stages"):
        convert(meta(cifar_resnet, 8, fused=False).state_dict(), "torchvision", stages=(1, 1, 1))


def test_labml_with_every_block_projected_keeps_its_stages_by_channels():
    net = meta(ResNet, BasicBlock, (2, 2), planes=(8, 16), shortcut="C", bias=True, num_classes=None)
    there = convert(net.state_dict(), dst="labml")
    assert convert(there, return_report=True)[1].stages == (2, 2)


def test_labml_with_a_classifier_beside_it():
    net = nn.Sequential(source_a.ResNetBase((1, 1), (8, 16), stride_rule="paper"), nn.Linear(16, 5))
    expected = from_stages((1, 1), (8, 16), num_classes=5, fused=False)
    expected.load_state_dict(convert(net.state_dict()), strict=True)
    assert list(convert(expected.state_dict(), dst="labml")) == list(net.state_dict())


def test_the_trunk_of_nested_sequentials_alone():
    trunk = source_d.stages(source_d.ResidualBlockType1, (1, 1), 8)
    there, report = convert(trunk.state_dict(), return_report=True)
    assert report.src == "resnetl" and "layer1.0.conv1.weight" in there
    assert list(convert(there, dst="resnetl", src="resnet_fused")) == list(trunk.state_dict())


@pytest.mark.parametrize(
    "architecture", ["resnet26d", "resnet50d", "resnet26t", "resnet50s", "seresnet50", "ecaresnet26t"]
)
def test_timm_variants_through_themselves(architecture):
    timm = pytest.importorskip("timm", reason="timm is not a dependency")
    source = meta(timm.create_model, architecture).state_dict()
    same, report = convert(source, dst="timm", return_report=True)
    assert report.src == "timm" and list(same) == list(source)


@pytest.mark.full
def test_every_timm_resnet_through_itself():
    """All that timm builds of its resnet module."""
    timm = pytest.importorskip("timm", reason="timm is not a dependency")
    for architecture in timm.list_models(module="resnet"):
        source = meta(timm.create_model, architecture).state_dict()
        same, report = convert(source, dst="timm", return_report=True)
        assert list(same) == list(source) and "timm" in (report.src, *report.also), architecture


def test_basic_and_bottleneck_stages_in_one_net():
    timm = pytest.importorskip("timm", reason="timm is not a dependency")
    source = meta(timm.create_model, "test_resnet").state_dict()
    assert "layer3.0.conv3.weight" in source and "layer1.0.conv3.weight" not in source
    assert list(convert(source, dst="timm")) == list(source)
    del source["layer3.0.conv3.weight"]
    with pytest.raises(ConversionError, match=r"timm: layer3.0.conv3.weight is missing"):
        convert(source)


@pytest.mark.parametrize(
    ("architecture", "entries"),
    [
        ("resnet18", 122),
        pytest.param("resnet34", 218, marks=pytest.mark.full),
        ("resnet50", 320),
        pytest.param("resnext101_32x8d", 626, marks=pytest.mark.full),
        pytest.param("resnet152", 932, marks=pytest.mark.full),
    ],
)
def test_torchvisions_nets_through_huggingfaces_names(architecture, entries):
    library = pytest.importorskip("torchvision.models", reason="torchvision is an optional extra")
    source = meta(getattr(library, architecture)).state_dict()
    there = convert(source, dst="transformers")
    back, report = convert(there, return_report=True)
    assert len(there) == entries and report.src == "transformers" and not report.warnings
    assert list(back) == list(source) and all(back[key] is source[key] for key in source)


def test_weights_older_than_the_counter():
    source = meta(cifar_resnet, 8, "B", fused=False).state_dict()
    old = {key: value for key, value in source.items() if not key.endswith("num_batches_tracked")}
    there, report = convert(old, return_report=True)
    assert list(there) == list(source) and {*report.created} == {*source} - {*old}


def test_timm_d_is_mmpretrains_and_mmdets_v1d():
    timm = pytest.importorskip("timm", reason="timm is not a dependency")
    source = meta(timm.create_model, "resnet26d").state_dict()
    mm = convert(source, dst="mmpretrain")
    assert {"backbone.stem.1.conv.weight", "backbone.layer1.0.downsample.0.weight"} < mm.keys()
    assert {"backbone.layer2.0.downsample.1.weight", "backbone.layer2.0.downsample.2.running_var"} < mm.keys()
    assert list(convert(mm, "mmpretrain", "timm")) == list(source)
    det = convert(source, dst="mmdet", drop="fc")
    assert {"backbone.stem.3.weight", "backbone.layer1.0.downsample.1.weight"} < det.keys()
    assert list(convert(det, "mmdet", "timm")) == [k for k in source if not k.startswith("fc.")]


def test_squeeze_and_excitation_is_mmpretrains():
    timm = pytest.importorskip("timm", reason="timm is not a dependency")
    source = meta(timm.create_model, "seresnet50").state_dict()
    there = convert(source, dst="mmpretrain")
    assert "backbone.layer1.0.se_layer.conv2.conv.bias" in there
    assert list(convert(there, dst="timm")) == list(source)
