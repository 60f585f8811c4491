"""The reference writings of the source architectures are what they claim to be, and every zoo model runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fused.eager import BasicBlock, Bottleneck, ResNet, StemConfig
from resnet_fused.resnet import from_stages
from tests.models import source_a, source_b, source_c, source_d
from tests.models.zoo import ZOO


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(build, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


@pytest.mark.parametrize(
    ("config", "rule", "expected"),
    [
        (([3, 3, 3], [16, 32, 64]), "labml", 272_912),
        (([3, 3, 3], [16, 32, 64]), "paper", 272_608),
        (([6, 6, 6], [16, 32, 64], [8, 16, 16]), "labml", 57_392),
        (([6, 6, 6], [16, 32, 64], [8, 16, 16]), "paper", 57_088),
    ],
)
def test_source_a_parameters(config, rule, expected):
    source = on_meta(source_a.ResNetBase, *config, first_kernel_size=3, stride_rule=rule)
    ours = on_meta(from_stages, *config, stem_kernel=3, stride_rule=rule, fused=False)
    assert (count(source), count(ours)) == (expected, expected)


@pytest.mark.parametrize(("rule", "side", "projections"), [("labml", 8, 3), ("paper", 4, 2)])
def test_source_a_stride_rules(rule, side, projections):
    model = source_a.ResNetBase([3, 3, 3], [16, 32, 64], first_kernel_size=3, stride_rule=rule)
    trunk = nn.Sequential(model.conv, model.bn, model.blocks)
    assert trunk(torch.randn(2, 3, 32, 32)).shape == (2, 64, side, side)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert sum(isinstance(m, source_a.ShortcutProjection) for m in model.modules()) == projections


@pytest.mark.parametrize("bottlenecks", [None, [8, 16, 16]])
@pytest.mark.parametrize("rule", ["labml", "paper"])
def test_from_stages_computes_what_source_a_does(bottlenecks, rule):
    """One net's tensors in the other's places: the same features to the bit."""
    config = ([2, 2, 2], [16, 32, 64], bottlenecks)
    source = source_a.ResNetBase(*config, first_kernel_size=3, stride_rule=rule)
    ours = from_stages(*config, stem_kernel=3, stride_rule=rule, fused=False)
    stem = {"conv": "conv1", "bn": "bn1"}
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]
    renamed = {}
    for key, value in source.state_dict().items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            rest = rest.replace("shortcut.conv", "downsample.0").replace("shortcut.bn", "downsample.1")
            renamed[f"{blocks[int(index)]}.{rest}"] = value
        else:
            name, rest = key.split(".")
            renamed[f"{stem[name]}.{rest}"] = value
    ours.load_state_dict(renamed, strict=True)
    ours.avgpool = nn.Identity()  # the two heads average in different orders
    trunk = nn.Sequential(source.conv, source.bn, source.blocks, nn.Flatten())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x), trunk(x))


@pytest.mark.parametrize(
    ("build", "parameters", "entries"),
    [
        (source_b.resnet18, 11_168_832, 120),
        (source_b.resnet50, 23_500_352, 318),
        (source_b.resnet101, 42_492_480, 624),
        (source_b.resnet152, 58_136_128, 930),
    ],
)
def test_source_b_sizes(build, parameters, entries):
    model = on_meta(build)
    assert (count(model), len(model.state_dict())) == (parameters, entries)


def test_source_b_keys_are_torchvisions_but_for_the_shortcut():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an optional extra")
    theirs = on_meta(torchvision.models.resnet50).state_dict()
    source = {k.replace("shortcut", "downsample"): v for k, v in on_meta(source_b.resnet50).state_dict().items()}
    assert {k: v.shape for k, v in source.items() if k != "conv1.weight"} == {
        k: v.shape for k, v in theirs.items() if k not in ("conv1.weight", "fc.weight", "fc.bias")
    }


@pytest.mark.parametrize(
    ("source", "ours"),
    [
        (
            lambda: source_b.ResNet(source_b.ResidualBlock, (2, 1, 1, 1), num_classes=10, width=8),
            lambda: ResNet(BasicBlock, (2, 1, 1, 1), 10, planes=(8, 16, 32, 64), stem=StemConfig(8, 3, 1, pool=False)),
        ),
        (
            lambda: source_b.ResNet(source_b.BottleneckBlock, (2, 1, 1, 1), num_classes=10, width=8),
            lambda: ResNet(Bottleneck, (2, 1, 1, 1), 10, planes=(8, 16, 32, 64), stem=StemConfig(8, 3, 1, pool=False)),
        ),
        (
            lambda: source_c.ResNet((1, 2), bottleneck=False, num_classes=10, channels=(8, 16)),
            lambda: ResNet(BasicBlock, (1, 2), 10, planes=(8, 16), stem=StemConfig(8), bias=True),
        ),
        (
            lambda: source_c.ResNet((1, 2), bottleneck=True, num_classes=10, channels=(8, 16)),
            lambda: ResNet(Bottleneck, (1, 2), 10, planes=(8, 16), stem=StemConfig(8), bias=True, stride_in="1x1"),
        ),
    ],
    ids=["b-basic", "b-bottleneck", "c-basic", "c-bottleneck"],
)
def test_our_family_computes_what_the_source_does(source, ours):
    """The keys differ, their order does not: the same output to the bit."""
    source, ours = source(), ours()
    tensors = source.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), tensors, strict=True)), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(x), source(x))


def test_source_b_zero_init_makes_blocks_identities():
    block = source_b.ResNet(source_b.ResidualBlock, (2, 1, 1, 1), zero_init_residual=True, width=8).layer1[1]
    x = torch.rand(2, 8, 4, 4)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("bottleneck", "layers", "torchvision_parameters"),
    [(False, (2, 2, 2, 2), 11_689_512), (True, (3, 4, 6, 3), 25_557_032)],
)
def test_source_c_is_the_papers_net_with_biases(bottleneck, layers, torchvision_parameters):
    model = on_meta(source_c.ResNet, layers, bottleneck)
    biases = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    assert count(model) == torchvision_parameters + biases


@pytest.mark.parametrize(("downsample", "uses"), [(False, 3), (True, 4)])
def test_source_c_literal_moves_its_shared_statistics_at_every_use(downsample, uses):
    block = source_c.LiteralBuildingBlock(8, 8, downsample)
    block(torch.randn(2, 8, 8, 8)).sum().backward()
    assert int(block.batch.num_batches_tracked) == uses
    assert (block.down.weight.grad is None) == (not downsample)


def test_source_c_literal_bottleneck_shares_two_batch_norms():
    block = source_c.LiteralBottleneckBlock(16, 16, 8)
    block(torch.randn(2, 16, 8, 8))
    assert [int(m.num_batches_tracked) for m in (block.batch1, block.batch2)] == [2, 2]


@pytest.mark.parametrize(
    ("depth", "parameters", "entries"),
    [
        (18, 11_692_392, 122),
        (34, 21_804_264, 234),
        (50, 40_136_040, 372),
        (101, 76_997_480, 763),
        (152, 107_359_592, 1154),
    ],
)
def test_source_d_sizes(depth, parameters, entries):
    model = on_meta(source_d.model, depth)
    assert (count(model), len(model.state_dict())) == (parameters, entries)
    assert "2.0.0.l1.weight" in model.state_dict()


@pytest.mark.parametrize(("depth", "projections"), [(18, 3), (50, 16), (101, 33), (152, 50)])
def test_source_d_projections(depth, projections):
    blocks = (source_d.ResidualBlockType1, source_d.ResidualBlockType2)
    model = on_meta(source_d.ResNetL, depth)
    assert sum(isinstance(m, blocks) and m.conform_layer is not None for m in model.modules()) == projections


@pytest.mark.parametrize(("depth", "expansion"), [(18, 1), (50, 4)])
def test_source_d_prints_the_papers_shapes(depth, expansion):
    x = torch.empty(5, 3, 224, 224, device="meta")
    shapes = []
    for module in [*(model := on_meta(source_d.model, depth))[:2], *model[2]]:
        x = module(x)
        shapes.append(tuple(x.shape[1:]))
    stages = [(64 * 2**i * expansion, 56 // 2**i, 56 // 2**i) for i in range(4)]
    assert shapes == [(64, 112, 112), (64, 56, 56), *stages]


def test_source_d_unknown_depth():
    with pytest.raises(ValueError, match=r"num_layers: expected one of .* got 20"):
        source_d.ResNetL(20)


@pytest.mark.parametrize(("factory", "shape"), [entry[1:] for entry in ZOO], ids=[entry[0] for entry in ZOO])
def test_zoo_models_train_and_are_traceable(factory, shape):
    """A step reaches every parameter that is used, and `torch.fx` sees the same function."""
    torch.manual_seed(0)
    model = factory()
    x = torch.randn(shape, requires_grad=True)
    out = model(x)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    literal_dead = {f"{i}.down.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert unused in (set(), literal_dead)
    model.eval()
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_zoo_names_are_unique():
    names = [name for name, *_ in ZOO]
    assert len(set(names)) == len(names)
