"""The family is the paper's and torchvision's: counts, FLOPs, keys, initialisation, outputs, errors."""

from __future__ import annotations

import copy
import importlib
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused import eager

resnet = importlib.import_module("resnet_fused.resnet")  # as an attribute of the package it is the builder

TORCHVISION_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
STATE_ENTRIES = {"resnet18": 122, "resnet34": 218, "resnet50": 320, "resnet101": 626, "resnet152": 932}
CIFAR_PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}
OPTION_B_EXTRA = 2_752
PAPER_GFLOPS = {18: 1.8, 34: 3.6, 50: 3.8, 101: 7.6, 152: 11.3}


@pytest.fixture
def models():
    return pytest.importorskip("torchvision.models", reason="torchvision is an optional extra")


def on_meta(build, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def gflops(model: nn.Module) -> float:
    """Multiply-adds of one 224 px image, in 1e9; the counter counts two operations for each."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2 / 1e9


def state_equal(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", resnet.ARCHITECTURES)
def test_torchvision_builders_have_its_structure(name, models):
    ours, theirs = on_meta(resnet.BUILDERS[name], fused=False), on_meta(getattr(models, name))
    assert count(ours) == TORCHVISION_PARAMETERS[name]
    a, b = ours.state_dict(), theirs.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in a.items()] == [(k, v.shape, v.dtype) for k, v in b.items()]
    assert repr(ours) == repr(theirs)  # every stride, padding, dilation and group
    assert len(a) == STATE_ENTRIES.get(name, len(b))


@pytest.mark.parametrize("name", resnet.ARCHITECTURES)
def test_torchvision_builders_cost_what_it_says(name, models):
    assert (
        round(gflops(on_meta(resnet.BUILDERS[name], fused=False)), 3)
        == models.get_model_weights(name).DEFAULT.meta["_ops"]
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet50", pytest.param("resnext50_32x4d", marks=pytest.mark.full)])
def test_torchvision_builders_are_its_nets_to_the_bit(name, models):
    """One seed gives one net; in training the outputs, gradients and buffers are torchvision's.

    The larger nets are these, repeated or widened, as the equal structures above show.
    """
    torch.manual_seed(1)
    ours = resnet.BUILDERS[name](num_classes=7, fused=False)
    torch.manual_seed(1)
    theirs = getattr(models, name)(num_classes=7)
    assert state_equal(ours, theirs)
    x = torch.randn(2, 3, 32, 32)
    out, expected = ours(x), theirs(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert state_equal(ours, theirs)
    torch.manual_seed(2)
    fresh = getattr(models, name)(num_classes=7)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert state_equal(ours, fresh)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"zero_init_residual": True}),
        ("resnet50", {"zero_init_residual": True}),
        ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
        ("resnet50", {"groups": 2, "width_per_group": 32}),
        ("resnet18", {"norm_layer": lambda channels: nn.GroupNorm(4, channels)}),
    ],
)
def test_torchvisions_options(name, options, models):
    torch.manual_seed(1)
    ours = resnet.BUILDERS[name](num_classes=7, fused=False, **options)
    torch.manual_seed(1)
    theirs = getattr(models, name)(num_classes=7, **options)
    assert state_equal(ours, theirs)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    assert repr(ours.layer4) == repr(theirs.layer4)


def test_frozen_batch_norm_as_norm_layer(models):
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is an optional extra")
    ours = resnet.resnet18(norm_layer=ops.FrozenBatchNorm2d, zero_init_residual=True, fused=False)
    theirs = models.resnet18(norm_layer=ops.FrozenBatchNorm2d, zero_init_residual=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))


def test_batch_norm_without_affine_as_norm_layer():
    model = resnet.cifar_resnet(
        8, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False), zero_init_residual=True, fused=False
    )
    assert torch.isfinite(model(torch.randn(2, 3, 8, 8))).all()


@pytest.mark.parametrize("depth", CIFAR_PARAMETERS)
def test_cifar_counts_are_the_papers(depth):
    expected = CIFAR_PARAMETERS[depth]
    for shortcut, extra in (("A", 0), ("A-sym", 0), ("B", OPTION_B_EXTRA), (None, 0)):
        model = on_meta(resnet.cifar_resnet, depth, shortcut, fused=False)
        assert count(model) == expected + extra
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == depth


def test_cifar_shapes_are_the_papers():
    model = resnet.cifar_resnet(20, fused=False)
    x, shapes = torch.randn(2, 3, 32, 32), []
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3"):
        x = getattr(model, name)(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("depth", PAPER_GFLOPS)
def test_table_1_flops(depth):
    """The paper's own nets (v1), whose figures it cuts or rounds to one decimal; and the plain ones."""
    cost = gflops(on_meta(resnet.resnet, depth, stride_in="1x1", fused=False))
    assert PAPER_GFLOPS[depth] in (math.floor(cost * 10) / 10, round(cost, 1))
    if depth < 50:
        plain, padded = (gflops(on_meta(resnet.resnet, depth, kind, fused=False)) for kind in (None, "A"))
        assert plain == padded < cost


def projections(model: nn.Module) -> int:
    return sum(isinstance(getattr(m, "downsample", None), nn.Sequential) for m in model.modules())


@pytest.mark.parametrize(("depth", "blocks", "changes"), [(34, 16, 3), (50, 16, 4)])
def test_shortcut_options_of_imagenet_nets(depth, blocks, changes):
    found = {}
    for shortcut in ("A", "A-sym", "B", "C"):
        model = on_meta(resnet.resnet, depth, shortcut, fused=False)
        found[shortcut] = projections(model)
        pads = sum(isinstance(m, eager.PadShortcut) for m in model.modules())
        assert pads == (changes if shortcut.startswith("A") else 0)
    assert found == {"A": 0, "A-sym": 0, "B": changes, "C": blocks}


@pytest.mark.parametrize("depth", [18, 50])
def test_projection_without_batch_norm_and_with_bias(depth):
    model = on_meta(resnet.resnet, depth, shortcut_bn=False, bias=True, fused=False)
    (projection,) = model.layer2[0].downsample
    assert isinstance(projection, nn.Conv2d) and projection.bias is not None
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    assert list(model.layer2[0].downsample.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(("stride_in", "strides"), [("1x1", (2, 1)), ("3x3", (1, 2))])
def test_stride_in(stride_in, strides):
    block = on_meta(resnet.resnet, 50, stride_in=stride_in, fused=False).layer2[0]
    assert tuple(conv.stride[0] for conv in (block.conv1, block.conv2)) == strides


def test_stride_in_changes_no_basic_net():
    nets = [on_meta(resnet.resnet, 18, stride_in=s, fused=False) for s in ("1x1", "3x3")]
    assert repr(nets[0]) == repr(nets[1])


@pytest.mark.parametrize(("shortcut", "front", "behind"), [("A", 0, 16), ("A-sym", 8, 8)])
def test_pad_conventions(shortcut, front, behind):
    model = resnet.cifar_resnet(8, shortcut, fused=False)
    x = torch.randn(2, 16, 7, 6)
    kept = x[:, :, 0::2, 0::2]
    zeros = [kept.new_zeros(2, n, *kept.shape[2:]) for n in (front, behind)]
    assert torch.equal(model.layer2[0].downsample(x), torch.cat([zeros[0], kept, zeros[1]], 1))


def test_symmetric_pad_of_a_bottleneck_is_symmetric():
    pad = on_meta(resnet.resnet, 50, "A-sym", fused=False).layer1[0].downsample
    assert (pad.channel_offset, pad.out_channels) == (96, 256)


def test_pad_shortcut_pickles_and_copies():
    pad, x = eager.PadShortcut(2, 3, 8), torch.randn(1, 4, 5, 5)
    for twin in (pickle.loads(pickle.dumps(pad)), copy.deepcopy(pad)):
        assert torch.equal(twin(x), pad(x))
    assert repr(pad) == "PadShortcut(stride=2, channel_offset=3, out_channels=8)"


def test_plain_block_has_no_shortcut():
    model = resnet.plain(20, fused=False)
    nn.init.zeros_(model.layer1[0].bn2.weight)
    assert not model.layer1[0](torch.rand(2, 16, 4, 4)).any()
    assert count(on_meta(resnet.plain, 34, fused=False)) == count(on_meta(resnet.resnet, 34, "A", fused=False))


def test_plain_depth_chooses_the_family():
    assert resnet.plain(20, fused=False).fc.out_features == 10
    assert on_meta(resnet.plain, 18, fused=False).fc.out_features == 1000
    assert resnet.plain(20, fused=False, num_classes=3, in_channels=1)(torch.randn(2, 1, 8, 8)).shape == (2, 3)


def test_headless_nets_give_the_pooled_features():
    torch.manual_seed(0)
    model = resnet.cifar_resnet(8, num_classes=None, fused=False)
    x = torch.randn(2, 3, 8, 8)
    headed = resnet.cifar_resnet(8, fused=False)
    headed.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(headed.fc(model(x)), headed(x))


def test_from_stages_names_and_ends():
    first = resnet.from_stages([1, 2], [8, 16], [4, 8], fused=False, in_channels=1, stem_kernel=3)
    second = resnet.from_stages([1, 2], [8, 16], bottleneck=[4, 8], img_channels=1, first_kernel_size=3, fused=False)
    assert repr(first) == repr(second)
    full = resnet.from_stages([1], [8], stem_relu=True, stem_pool=True, num_classes=5, bias=False, fused=False)
    assert isinstance(full.relu, nn.ReLU) and isinstance(full.maxpool, nn.MaxPool2d)
    assert full(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    assert all(m.bias is None for m in full.modules() if isinstance(m, nn.Conv2d))
    assert isinstance(first.relu, nn.Identity) and isinstance(first.maxpool, nn.Identity)


def test_stem_and_conv_bn_relu_are_their_children_in_order():
    stem = eager.Stem(3, 8)
    x = torch.randn(2, 3, 15, 16)
    assert torch.equal(stem(x), nn.Sequential(stem.conv, stem.bn, nn.ReLU(), nn.MaxPool2d(3, 2, 1))(x))
    site = eager.ConvBNReLU(4, 8, 3, dilation=2, groups=2, relu=False)
    x = torch.randn(2, 4, 9, 9)
    out = site(x)
    assert out.shape == (2, 8, 9, 9) and bool((out < 0).any())
    assert torch.equal(out, site.bn(site.conv(x)))
