"""`convert` by keys: every format's real models, and every pair of formats."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

from resnet_fused import convert
from resnet_fused.checkpoints import ALIASES, FORMATS
from resnet_fused.eager import BasicBlock, Bottleneck, ResNet, StemConfig
from resnet_fused.resnet import cifar_resnet, from_stages, resnet18
from tests.models import checkpoints as models
from tests.models import source_a, source_b, source_c, source_d

STAGES = (1, 2, 1, 1)
KINDS = ("basic", "bottleneck")


def meta(build, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


def ours(kind: str, **options) -> nn.Module:
    return meta(ResNet, Bottleneck if kind == "bottleneck" else BasicBlock, STAGES, **options)


def theirs(name: str, kind: str) -> nn.Module:
    """A model that this format's own code base builds, headless where that is its nature."""
    deep = kind == "bottleneck"
    if name == "torchvision":
        library = pytest.importorskip("torchvision.models.resnet", reason="torchvision is an optional extra")
        return meta(library.ResNet, library.Bottleneck if deep else library.BasicBlock, STAGES)
    if name == "timm":
        library = pytest.importorskip("timm.models.resnet", reason="timm is not a dependency")
        return meta(library.ResNet, library.Bottleneck if deep else library.BasicBlock, STAGES)
    if name == "transformers":
        library = pytest.importorskip("transformers", reason="transformers is not a dependency")
        sizes = [64 * 2**i * (4 if deep else 1) for i in range(4)]
        config = library.ResNetConfig(hidden_sizes=sizes, depths=list(STAGES), layer_type=kind, num_labels=1000)
        return meta(library.ResNetForImageClassification, config)
    if name in ("mmpretrain", "caffe"):
        return meta(models.MMNet, ours(kind, num_classes=None), 2048 if deep else 512, 1000)
    if name == "mmdet":
        return meta(models.MMNet, ours(kind, num_classes=None))
    if name == "detectron2":
        return meta(models.Detectron, deep, STAGES)
    if name in ("kuangliu", "akamaster"):
        block = source_b.BottleneckBlock if deep else source_b.ResidualBlock
        return meta(models.CIFARNet, block, STAGES, num_classes=1000)
    if name == "shortcut":
        block = source_b.BottleneckBlock if deep else source_b.ResidualBlock
        return meta(source_b.ResNet, block, STAGES, num_classes=1000)
    if name in ("labml", "labml-old"):
        channels = [64 * 2**i * (4 if deep else 1) for i in range(4)]
        mids = [64, 128, 256, 512] if deep else None
        net = meta(source_a.ResNetBase, STAGES, channels, mids, stride_rule="paper")
        return net if name == "labml" else models.old_labml(net)
    if name == "sequences":
        return meta(source_c.ResNet, STAGES, deep)
    block = source_d.ResidualBlockType2 if deep else source_d.ResidualBlockType1
    return meta(lambda: source_d.whole(source_d.stages(block, STAGES, 64), 64, 2048 if deep else 512))


def twin(name: str, kind: str) -> nn.Module:
    """Our model with the same tensors."""
    if name in ("labml", "labml-old"):
        deep = kind == "bottleneck"
        channels = [64 * 2**i * (4 if deep else 1) for i in range(4)]
        return meta(from_stages, STAGES, channels, [64, 128, 256, 512] if deep else None, fused=False)
    if name == "sequences":
        return ours(kind, bias=True)
    if name == "resnetl":
        net = ours(kind, bias=True, shortcut_bn=False, shortcut="C" if kind == "bottleneck" else "B")
        net.bn1 = nn.Identity()
        return net
    head = 1000 if FORMATS[name].layouts[0].head or name == "transformers" else None
    return ours(kind, num_classes=head, stem=StemConfig(kernel=3 if FORMATS[name].stem == "ReLU, no pool" else 7))


@functools.cache
def small_bottlenecks() -> dict[str, torch.Tensor]:
    return meta(ResNet, Bottleneck, (1, 2), planes=(8, 16), num_classes=10).state_dict()


OWN = [name for name in FORMATS if name != "resnet_fused"]
READ_AS = {"timm": "torchvision", "mmdet": "mmpretrain", "caffe": "mmpretrain", "akamaster": "kuangliu"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OWN)
def test_real_models_both_ways(name, kind):
    """Keys, their order, shapes and objects, to our model and back, with the format found out."""
    source, ours_ = theirs(name, kind).state_dict(), twin(name, kind).state_dict()
    there, report = convert(source, None, "resnet_fused", return_report=True)
    assert report.src == READ_AS.get(name, name)
    assert name == report.src or name in report.also
    assert [(k, v.shape, v.dtype) for k, v in there.items()] == [(k, v.shape, v.dtype) for k, v in ours_.items()]
    assert list(report.keys) == list(source)
    assert all(there[new] is source[old] for old, new in report.keys.items())
    assert set(report.created) == {k for k in there if k not in report.keys.values()}
    assert all(there[k].dtype == torch.int64 and k.endswith("num_batches_tracked") for k in report.created)
    assert bool(report.created) == (name == "detectron2")
    back, report = convert(there, "resnet_fused", name, return_report=True)
    assert list(back) == list(source)
    assert all(back[k] is source[k] for k in source)
    assert set(report.dropped.values()) == ({"detectron2's batch norms have none"} if name == "detectron2" else set())


@pytest.mark.parametrize(("src", "dst"), [*itertools.product(FORMATS, FORMATS)])
def test_every_pair(src, dst):
    """Through any two formats and back: the same objects under the same keys, but for what was dropped by name."""
    deep = ("fc",) if None in (FORMATS[src].layouts[-1].head, FORMATS[dst].layouts[-1].head) else ()
    normless = ("stem.norm", "shortcut.norm") if "resnetl" in (src, dst) else ()
    counters = ("num_batches_tracked",) if "detectron2" in (src, dst) else ()
    drop = (*deep, *normless, *counters)
    start = convert(small_bottlenecks(), "torchvision", src, drop=drop)
    there, report = convert(start, src, dst, drop=drop, return_report=True)
    assert not report.dropped and not report.created and len(there) == len(start)
    assert {*report.keys} == {*start} and {*report.keys.values()} == {*there}
    back = convert(there, dst, src, drop=drop)
    assert list(back) == list(start)
    assert all(back[key] is start[key] for key in start)


@pytest.mark.parametrize(("name", "target"), ALIASES.items())
def test_aliases(name, target):
    net = cifar_resnet(8, fused=False, bias=True).state_dict()
    drop = ("stem.norm",) if target == "resnetl" else ()
    drop += ("fc",) if target == "mmdet" else ()
    assert list(convert(net, dst=name, drop=drop)) == list(convert(net, dst=target, drop=drop))


def test_option_a_and_plain_nets_are_ours_or_akamasters():
    net = meta(models.CIFARNet, models.PadBlock, (3, 3, 3), 16)
    there, report = convert(net.state_dict(), None, "resnet_fused", return_report=True)
    assert report.src == "akamaster" and "kuangliu" in report.also and not report.warnings
    expected = meta(cifar_resnet, 20, "A-sym", fused=False)
    expected.load_state_dict(there, strict=True, assign=True)
    _, report = convert(there, return_report=True)
    assert report.src == "resnet_fused"
    assert any("pads with zeros" in warning for warning in report.warnings)


def test_huggingface_with_and_without_its_prefix():
    library = pytest.importorskip("transformers", reason="transformers is not a dependency")
    config = library.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    bare, headed = meta(library.ResNetModel, config), meta(library.ResNetForImageClassification, config)
    for net in (bare, headed):
        source = net.state_dict()
        assert list(convert(convert(source), dst="transformers")) == list(source)


def test_frozen_norms_and_counters():
    frozen = meta(models.Detectron, True, (1, 1), 8).state_dict()
    trained = meta(models.Detectron, True, (1, 1), 8, nn.BatchNorm2d).state_dict()
    there, report = convert(frozen, return_report=True)
    assert len(report.created) == sum(k.endswith("running_mean") for k in there)
    assert list(convert(there, dst="detectron2")) == list(frozen)
    assert list(convert(there, dst="detectron2", num_batches_tracked=True)) == list(trained)
    assert not any("num_batches" in k for k in convert(frozen, num_batches_tracked=False))
    assert not any("num_batches" in k for k in convert(trained, drop="num_batches_tracked"))


def test_group_norm_gets_no_counter():
    with torch.device("meta"):
        net = ResNet(BasicBlock, (1, 1), planes=(8, 16), norm_layer=lambda c: nn.GroupNorm(4, c))
    there = convert(net.state_dict(), dst="transformers")
    assert not any("num_batches" in key for key in there)
    assert list(convert(there)) == list(net.state_dict())


def test_dtypes_and_counters_are_carried_as_they_are():
    net = cifar_resnet(8, fused=False).to(torch.bfloat16)
    net.bn1.num_batches_tracked.fill_(7)
    there = convert(net.state_dict(), dst="transformers")
    assert there["resnet.embedder.embedder.convolution.weight"].dtype == torch.bfloat16
    assert int(there["resnet.embedder.embedder.normalization.num_batches_tracked"]) == 7


def test_loads_strictly_into_a_fused_model():
    library = pytest.importorskip("torchvision.models", reason="torchvision is an optional extra")
    source = library.resnet18().state_dict()
    fused = resnet18()
    fused.load_state_dict(convert(convert(source, dst="transformers")), strict=True)
    assert all(torch.equal(value, source[key]) for key, value in fused.state_dict().items())
    assert list(convert(fused.state_dict(), dst="torchvision")) == list(source)
