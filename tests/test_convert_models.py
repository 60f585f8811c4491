"""`convert` by results: the converted net computes what the source computes, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import convert, fuse
from resnet_fused.eager import BasicBlock, Bottleneck, ResNet, StemConfig
from resnet_fused.modules import Fused
from resnet_fused.resnet import cifar_resnet, from_stages
from tests.harness import hold_to_law, randomise
from tests.models import checkpoints as models
from tests.models import source_a, source_b, source_c, source_d

PLANES = (8, 16)
SMALL = StemConfig(8)
CIFAR = StemConfig(8, 3, 1, pool=False)


def image(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def prepared(net: nn.Module) -> nn.Module:
    return randomise(net).eval()


def loaded(net: nn.Module, source: nn.Module, **options) -> nn.Module:
    """``net`` with the converted tensors of ``source``, and not those that it was made with."""
    net.load_state_dict(convert(source.state_dict(), **options), strict=True)
    return net.eval()


def test_timm_is_torchvision():
    timm = pytest.importorskip("timm", reason="timm is not a dependency")
    library = pytest.importorskip("torchvision.models", reason="torchvision is an optional extra")
    source = prepared(timm.create_model("resnet18"))
    assert torch.equal(loaded(library.resnet18(), source, src="timm")(image()), source(image()))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_huggingface_is_ours(kind):
    library = pytest.importorskip("transformers", reason="transformers is not a dependency")
    deep = kind == "bottleneck"
    sizes = [4 * p if deep else p for p in PLANES]
    config = library.ResNetConfig(embedding_size=8, hidden_sizes=sizes, depths=[1, 2], layer_type=kind, num_labels=5)
    source = prepared(library.ResNetForImageClassification(config))
    net = ResNet(Bottleneck if deep else BasicBlock, (1, 2), 5, planes=PLANES, stem=SMALL)
    assert torch.equal(loaded(net, source)(image()), source(image()).logits)


def test_huggingface_from_torchvision():
    library = pytest.importorskip("torchvision.models", reason="torchvision is an optional extra")
    hub = pytest.importorskip("transformers", reason="transformers is not a dependency")
    config = hub.ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000
    )
    source, net = prepared(library.resnet18()), hub.ResNetForImageClassification(config)
    assert torch.equal(loaded(net, source, dst="transformers")(image()).logits, source(image()))


def test_timm_d_is_mmpretrains_v1d():
    timm = pytest.importorskip("timm", reason="timm is not a dependency")
    source = prepared(timm.create_model("resnet26d", num_classes=0))
    blocks = ResNet(Bottleneck, (2, 2, 2, 2), num_classes=None)
    net = models.MMNet(models.MMTrunkD([getattr(blocks, name) for name in blocks.stages]))
    loaded(net, source, dst="mmpretrain")
    assert torch.equal(net.backbone(image()), source.forward_features(image()))


@pytest.mark.parametrize("deep", [False, True])
def test_detectron2_is_ours_with_its_stride(deep):
    source = prepared(models.Detectron(deep, (1, 2), 8))
    for buffer in source.buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5)
    net = ResNet(Bottleneck if deep else BasicBlock, (1, 2), None, planes=PLANES, stem=SMALL, stride_in="1x1")
    net.avgpool = nn.Identity()
    assert torch.equal(loaded(net, source)(image()), source(image()).flatten(1))


@pytest.mark.parametrize("block", [source_b.ResidualBlock, source_b.BottleneckBlock])
def test_kuangliu_is_ours(block):
    source = prepared(models.CIFARNet(block, (1, 2), 8))
    ours = Bottleneck if block is source_b.BottleneckBlock else BasicBlock
    net = ResNet(ours, (1, 2), 10, planes=PLANES, stem=CIFAR)
    assert torch.equal(loaded(net, source)(image(16)), source(image(16)))


def test_akamaster_is_ours_with_symmetric_padding():
    source = prepared(models.CIFARNet(models.PadBlock, (3, 3, 3), 16))
    assert torch.equal(loaded(cifar_resnet(20, "A-sym", fused=False), source)(image()), source(image()))


@pytest.mark.parametrize("bottlenecks", [None, (8, 8)])
def test_labml_is_ours(bottlenecks):
    source = prepared(source_a.ResNetBase((2, 1), (16, 32), bottlenecks))
    net = loaded(from_stages((2, 1), (16, 32), bottlenecks, stride_rule="labml", fused=False), source)
    net.avgpool = nn.Identity()  # the two average in different orders
    trunk = nn.Sequential(source.conv, source.bn, source.blocks, nn.Flatten())
    assert torch.equal(net(image()), trunk(image()))


@pytest.mark.parametrize("deep", [False, True])
def test_sequences_are_ours(deep):
    source = prepared(source_c.ResNet((1, 2), deep, 5, PLANES))
    ours = Bottleneck if deep else BasicBlock
    net = ResNet(ours, (1, 2), 5, planes=PLANES, stem=SMALL, stride_in="1x1", bias=True)
    assert torch.equal(loaded(net, source)(image()), source(image()))


def resnetl(deep: bool) -> tuple[nn.Module, nn.Module]:
    """Source D in small, and our net of its structure."""
    block = source_d.ResidualBlockType2 if deep else source_d.ResidualBlockType1
    source = source_d.whole(source_d.stages(block, (1, 2), 8), 8, 64 if deep else 16, 5)
    options = {"shortcut": "C" if deep else "B", "shortcut_bn": False, "stride_in": "1x1", "bias": True}
    stem = StemConfig(8, relu=False)
    net = ResNet(Bottleneck if deep else BasicBlock, (1, 2), 5, planes=PLANES, stem=stem, **options)
    net.bn1 = nn.Identity()
    return source, net


@pytest.mark.parametrize("deep", [False, True])
def test_nested_sequentials_are_ours(deep):
    source, net = resnetl(deep)
    prepared(source)
    assert torch.equal(loaded(net, source)(image()), source(image()))
    again = loaded(copy.deepcopy(source), net, dst="resnetl")
    assert torch.equal(again(image()), source(image()))


def test_a_fused_model_trains_on_converted_weights():
    source = prepared(models.CIFARNet(source_b.ResidualBlock, (1, 2), 8))
    net = loaded(ResNet(BasicBlock, (1, 2), 10, planes=PLANES, stem=CIFAR), source).train()
    fused = hold_to_law(net, image(8), torch.float32)
    assert any(isinstance(module, Fused) for module in fused.modules())


def test_loading_into_a_fused_model_gives_what_fusing_the_loaded_one_gives():
    source = prepared(models.CIFARNet(source_b.ResidualBlock, (1, 2), 8))
    first = fuse(ResNet(BasicBlock, (1, 2), 10, planes=PLANES, stem=CIFAR))
    second = fuse(loaded(ResNet(BasicBlock, (1, 2), 10, planes=PLANES, stem=CIFAR), source))
    assert torch.equal(loaded(first, source)(image(16)), second(image(16)))
