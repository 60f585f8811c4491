"""Which modules of a whole model `find_chains` reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from resnet_fused.recognise import Refusal, find_chains
from resnet_fused.spec import ChainSpec, ShortcutSpec, SiteSpec

from .models.zoo import ZOO
from .test_recognise import IDENTITY, Block, make, projection


def _walk(model: nn.Module) -> tuple[dict[str, ChainSpec], dict[str, str]]:
    chains: dict[str, ChainSpec] = {}
    refused: dict[str, str] = {}
    for name, module, result in find_chains(model):
        assert model.get_submodule(name) is module
        if isinstance(result, ChainSpec):
            chains[name] = result
        else:
            refused[name] = result.reason
    return chains, refused


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    torchvision = pytest.importorskip("torchvision", reason="walks torchvision's models")
    with torch.device("meta"):  # only the structure is looked at
        yield torchvision.models


def test_walk_finds_the_blocks_of_resnets(models: Any) -> None:
    for build, blocks in ((models.resnet18, 8), (models.resnet50, 16), (models.wide_resnet101_2, 33)):
        chains, refused = _walk(build())
        assert len(chains) == blocks and not refused
    sites = tuple(SiteSpec(f"conv{i}", f"bn{i}", i < 3) for i in (1, 2, 3))
    projection = ShortcutSpec("projection", SiteSpec("downsample.0", "downsample.1", False))
    chains, _ = _walk(models.resnet50())
    assert chains["layer1.0"] == ChainSpec(sites, projection, inner=("relu", "downsample"))
    assert chains["layer1.1"] == ChainSpec(sites, IDENTITY, inner=("relu",))


def test_walk_reports_blocks_and_not_models(models: Any) -> None:
    chains, refused = _walk(models.mobilenet_v2())
    assert not chains and len(refused) == 17
    assert refused["features.2"] == "'conv.0.2' (ReLU6) is not part of a conv-BN-ReLU chain"
    chains, refused = _walk(models.densenet121())
    assert not chains and len(refused) == 58 and all("denselayer" in name for name in refused)
    assert {"cat" in text for text in refused.values()} == {True}


def test_walk_below_a_refused_block() -> None:
    excited = make(lambda b, x: b.main(x) * 2 + b.skip(x), 4, 8, 2, skip=projection())
    entries = list(find_chains(nn.Sequential(excited, Block(8, 8))))
    assert [(name, type(result)) for name, _, result in entries] == [
        ("0", Refusal),
        ("0.skip", ChainSpec),
        ("1", ChainSpec),
    ]


def test_walk_is_silent_where_the_chains_inside_cover_everything() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    gate = type("Gate", (nn.Module,), {"forward": lambda m, x: m.body(x).sigmoid()})()
    gate.body = body
    assert [(name, type(result)) for name, _, result in find_chains(gate)] == [("body", ChainSpec)]
    gate.loose = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    assert [(name, type(result)) for name, _, result in find_chains(gate)] == [("", Refusal), ("body", ChainSpec)]


def test_walk_prefers_the_block_to_its_wrapper() -> None:
    block = Block()
    chains, refused = _walk(nn.Sequential(nn.Sequential(block)))
    assert list(chains) == ["0.0"] and not refused


def test_walk_reports_a_shared_block_once() -> None:
    block = Block()
    model = nn.Sequential(nn.Sequential(block), nn.Sequential(block))
    assert [name for name, _, _ in find_chains(model)] == ["0.0"]


@pytest.mark.parametrize(("build", "shape"), [entry[1:] for entry in ZOO], ids=[entry[0] for entry in ZOO])
def test_walk_over_the_zoo(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = build()
    chains, refused = _walk(model)
    assert chains and not refused
