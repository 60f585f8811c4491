"""What other libraries' ResNets are made of: which of their blocks are fused, which are refused and by what name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import explain, fuse, unfuse

from .harness import hold_to_law, randomise
from .models import others

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
SMALL = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def timm_net(block: str, count: int = 1, stages: int = 2, **options: Any) -> nn.Module:
    """timm's ResNet with small stages, of which it always makes four; those past ``stages`` are then taken out."""
    resnet = pytest.importorskip("timm.models.resnet", reason="timm is not installed")
    torch.manual_seed(0)
    net = resnet.ResNet(getattr(resnet, block), (count, 1, 1, 1), 5, channels=(8,) * 4, stem_width=8, **options)
    for i in range(stages, 4):
        setattr(net, f"layer{i + 1}", nn.Identity())
    return net


def blurred() -> nn.Module:
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    return timm_net("Bottleneck", aa_layer=layers.BlurPool2d)


def hf_net(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type=kind, num_labels=3
    )
    return Logits(transformers.ResNetForImageClassification(config))


class Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits


def frozen_norm() -> Any:
    return pytest.importorskip("torchvision", reason="torchvision is an optional extra").ops.FrozenBatchNorm2d


# id: the net, its input, the names of what is fused, and of what is refused with a part of the reason
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str], dict[str, str]]] = {
    "timm-18": (lambda: timm_net("BasicBlock"), X, {"conv1", "layer1.0", "layer2.0"}, {}),
    "timm-50": (lambda: timm_net("Bottleneck", 2), X, {"conv1", "layer1.0", "layer1.1", "layer2.0"}, {}),
    "timm-26-tiered-d": (
        lambda: timm_net("Bottleneck", stem_type="deep_tiered", avg_down=True),
        X,
        {"conv1.0", "layer1.0", "layer2.0"},
        {},
    ),
    "timm-s": (
        lambda: timm_net("BasicBlock", stem_type="deep", avg_down=True, block_reduce_first=2),
        X,
        {"conv1.0", "layer1.0", "layer2.0"},
        {},
    ),
    "timm-replaced-pool": (
        lambda: timm_net("BasicBlock", stages=1, replace_stem_pool=True),
        X,
        {"conv1", "maxpool", "layer1.0"},
        {},
    ),
    "timm-se": (
        lambda: timm_net("Bottleneck", block_args={"attn_layer": "se"}),
        X,
        {"conv1", "layer1.0.downsample", "layer2.0.downsample"},
        {"layer1.0": "'se' (SEModule)", "layer2.0": "'se' (SEModule)"},
    ),
    "timm-blur": (blurred, X, {"conv1", "layer1.0", "layer2.0.downsample"}, {"layer2.0": "'aa' (BlurPool2d)"}),
    "timm-drop-path": (
        lambda: timm_net("BasicBlock", drop_path_rate=0.5),
        X,
        {"conv1", "layer1.0", "layer2.0.downsample"},
        {"layer2.0": "'drop_path' (DropPath) does different things in training and in eval mode"},
    ),
    "timm-drop-block": (
        lambda: timm_net("BasicBlock", stages=3, drop_block_rate=0.3),
        X,
        {"conv1", "layer1.0", "layer2.0", "layer3.0.downsample"},
        {"layer3.0": "'drop_block' (DropBlock2d)"},
    ),
    "hf-basic": (
        lambda: hf_net("basic"),
        X,
        {f"net.resnet.{name}" for name in ("embedder.embedder", "encoder.stages.0.layers.0")}
        | {f"net.resnet.encoder.stages.1.layers.{i}" for i in (0, 1)},
        {},
    ),
    "hf-bottleneck": (
        lambda: hf_net("bottleneck"),
        X,
        {f"net.resnet.{name}" for name in ("embedder.embedder", "encoder.stages.0.layers.0")}
        | {f"net.resnet.encoder.stages.1.layers.{i}" for i in (0, 1)},
        {},
    ),
    "mmcv": (
        lambda: others.One(others.MMResNet()),
        X,
        {"net.conv1"} | {f"net.layer{i}.{j}" for i in (1, 2) for j in (0, 1)},
        {},
    ),
    "mmcv-frozen": (
        lambda: others.One(others.MMResNet(frozen_stages=1, norm_eval=True)),
        X,
        {"net.conv1"} | {f"net.layer{i}.{j}" for i in (1, 2) for j in (0, 1)},
        {},
    ),
    "mmcv-checkpointed": (
        lambda: others.One(others.MMResNet(with_cp=True)),
        X,
        {"net.conv1"},
        {f"net.layer{i}.{j}": "data-dependent control flow" for i in (1, 2) for j in (0, 1)},
    ),
    "detectron2": (
        lambda: others.One(others.D2ResNet()),
        X,
        {"net.stem"} | {f"net.res{i}.{j}" for i in (2, 3) for j in (0, 1)},
        {},
    ),
    "detectron2-frozen": (
        lambda: others.One(others.D2ResNet(frozen_norm())),
        X,
        {"net.stem"} | {f"net.res{i}.{j}" for i in (2, 3) for j in (0, 1)},
        {},
    ),
    "kuangliu": (
        lambda: others.CifarResNet("B"),
        SMALL,
        {"conv1"} | {f"layer{i}.{j}" for i in (1, 2) for j in (0, 1)},
        {},
    ),
    "akamaster": (
        lambda: others.CifarResNet("A"),
        SMALL,
        {"conv1"} | {f"layer{i}.{j}" for i in (1, 2) for j in (0, 1)},
        {},
    ),
}


QUICK = {"timm-s", "timm-se", "timm-drop-path", "mmcv", "detectron2", "akamaster"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in CASES])
def test_package(name: str) -> None:
    build, x, fused_names, refused = CASES[name]
    net = randomise(build())
    before = [(path, type(m), sorted(m.__dict__)) for path, m in net.named_modules()]
    records = explain(fuse(net)).blocks
    assert {r.name for r in records if r.fused} == fused_names
    reasons = {r.name: r.reason for r in records if not r.fused}
    assert reasons.keys() == refused.keys()
    assert all(words in reasons[path] for path, words in refused.items()), reasons
    assert [(path, type(m), sorted(m.__dict__)) for path, m in unfuse(net).named_modules()] == before
    if not any("drop" in words for words in refused.values()):
        hold_to_law(net, x, torch.float64)


def test_drop_path_draws_as_it_did() -> None:
    net = randomise(timm_net("BasicBlock", drop_path_rate=0.5))
    results = []
    for model in (net, fuse(copy.deepcopy(net))):
        torch.manual_seed(5)
        results += [(model(X), torch.rand(()))]
    (ref, after), (got, fused_after) = results
    torch.testing.assert_close(got, ref)
    assert torch.equal(after, fused_after)
    net.layer2[0].drop_path = nn.Identity()
    assert all(record.fused for record in explain(fuse(net)).blocks)


@pytest.mark.parametrize("kind", ["basic", pytest.param("bottleneck", marks=pytest.mark.full)])
def test_hidden_states_are_the_same(kind: str) -> None:
    net = randomise(hf_net(kind).net)
    ref = copy.deepcopy(net)(X, output_hidden_states=True)
    got = fuse(net)(X, output_hidden_states=True)
    assert type(got) is type(ref) and len(got.hidden_states) == len(ref.hidden_states) == 3
    torch.testing.assert_close((got.logits, *got.hidden_states), (ref.logits, *ref.hidden_states))


def test_norm_eval_is_seen_at_every_call() -> None:
    net = fuse(randomise(others.MMResNet()))
    net.norm_eval = True
    net.train()
    before = {name: b.clone() for name, b in net.named_buffers()}
    ref = unfuse(copy.deepcopy(net))(X)
    torch.testing.assert_close(net(X), ref)
    assert all(torch.equal(before[name], b) for name, b in net.named_buffers())


def test_detectron2_takes_an_empty_batch_as_written() -> None:
    net = others.D2ResNet().eval()
    empty = X[:0]
    assert [t.shape for t in fuse(copy.deepcopy(net))(empty).values()] == [t.shape for t in net(empty).values()]
