"""The plan of every site: what it says is what runs, and every decision has its reason."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from resnet_fused import chain, engines, explain, fuse, plan, recompute
from resnet_fused.engines import cpu
from resnet_fused.projection import unavailable
from resnet_fused.resnet import BUILDERS
from resnet_fused.siteplan import SitePlan, conv_shapes, site_plans
from tests.models.zoo import ZOO

META = torch.empty(2, 3, 32, 32, device="meta")
NETWORKS = ("resnet18", "cifar-20", "plain-20")


def decisions(plans: list[SitePlan]) -> list[plan.Variant]:
    return [decision for site in plans for decision in (site.variant, site.prologue)]


@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_has_a_plan_with_reasons(name, memory):
    model = fuse(BUILDERS[name](fused=False), memory=memory)
    plans = site_plans(model, META)
    convs = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(site.conv for site in plans) == sorted(convs)
    assert all(decision.reason.strip() for decision in decisions(plans))
    assert {site.memory for site in plans} == {memory}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_the_triton_engines_plan_has_reasons_too(name, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    model = fuse(BUILDERS[name](fused=False), engine="triton")
    with engines.emulated():
        plans = site_plans(model, META.to(dtype))
    assert {site.engine for site in plans} == {"triton"}
    assert all(decision.reason.strip() for decision in decisions(plans))
    groups = [site for site in plans if site.shape.groups > 1]
    assert all(site.variant == plan.Variant(plan.LIBRARY, "32 groups") for site in groups)
    assert bool(groups) == (name == "resnext50_32x4d")
    fused = [site for site in plans if site.prologue.name == "fused"]
    assert all(site.variant.name == plan.OWN and site.source != "plain" for site in fused)
    assert bool(fused) == any(site.variant.name == plan.OWN for site in plans)


@pytest.mark.parametrize(
    ("variant", "source", "skip", "owns"),
    list(
        itertools.product(
            (plan.OWN, plan.LIBRARY, plan.EXTENSION, plan.PRODUCT),
            ("plain", "pending", "join"),
            ("none", "identity", "pad", "projection"),
            (True, False),
        )
    ),
)
def test_a_prologue_always_has_a_reason(variant, source, skip, owns):
    found = plan.prologue(variant, source, skip, owns)
    assert found.name in ("none", "fused", "materialised") and found.reason.strip()
    assert (found.name == "none") == (source == "plain")
    if found.name == "fused":
        assert variant == plan.OWN and (source == "pending" or (owns and skip != "pad"))


class Seen:
    """Notes how every site's source was read while a model runs, by the convolution's name."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sources: dict[str, str] = {}
        names = {id(module.weight): path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        original = chain.SiteFunction.apply

        def apply(node, *tensors):
            self.sources[names[id(tensors[6])]] = node.kind
            return original(node, *tensors)

        def recomputing(node, *tensors):
            weights = [id(t) for t in tensors[6:] if id(t) in names]
            self.sources[names[weights[0]]] = node.kind
            return rebuilt(node, *tensors)

        rebuilt = recompute.RecomputeFunction.apply
        monkeypatch.setattr(chain.SiteFunction, "apply", apply)
        monkeypatch.setattr(chain.RecomputeFunction, "apply", recomputing)


@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
@pytest.mark.parametrize("name", NETWORKS)
def test_sources_are_what_the_chain_reads(name, memory, monkeypatch):
    model = fuse(BUILDERS[name](fused=False), memory=memory)
    seen = Seen(model, monkeypatch)
    model(torch.randn(2, 3, 32, 32))
    planned = {site.conv: site.source for site in site_plans(model, META)}
    assert seen.sources and {conv: planned[conv] for conv in seen.sources} == seen.sources


def test_a_stage_alone_and_a_block_alone_have_their_extents():
    model = BUILDERS["resnet18"](fused=False)
    stage, block = fuse(model.layer1), fuse(BUILDERS["resnet18"](fused=False).layer1[0])
    x = torch.empty(2, 64, 8, 8, device="meta")
    assert [site.source for site in site_plans(stage, x)] == ["plain", "pending", "join", "pending"]
    assert {site.extent for site in site_plans(stage, x)} == {"stage"}
    assert [(site.source, site.extent) for site in site_plans(block, x)] == [("plain", "block"), ("pending", "block")]


def test_a_hooked_block_has_no_plan():
    model = fuse(BUILDERS["resnet18"](fused=False))
    model.layer1[0].conv1.register_forward_hook(lambda *_: None)
    plans = site_plans(model, META)
    assert not any(site.block == "layer1.0" for site in plans)
    # What follows it is handed a finished tensor.
    assert next(site.source for site in plans if site.conv == "layer1.1.conv1") == "plain"


def test_the_shortcut_says_who_runs_it(monkeypatch):
    model = fuse(BUILDERS["resnet18"](fused=False))
    small = {site.conv: site for site in site_plans(model, META[:, :, ::2, ::2])}
    found = small["layer4.0.downsample.0"]
    assert found.variant.name == plan.LIBRARY and "so small" in found.variant.reason
    monkeypatch.setattr(plan, "SMALL_PRODUCT", 0)
    found = next(site for site in site_plans(model, META) if site.conv == "layer2.0.downsample.0")
    absent = unavailable(torch.device("cpu"), torch.float32)
    assert found.variant.name == (plan.EXTENSION if absent is None else plan.LIBRARY)
    with plan.force(plan.LIBRARY):
        found = next(site for site in site_plans(model, META) if site.conv == "layer2.0.downsample.0")
    assert found.variant.name == plan.LIBRARY


@pytest.mark.parametrize(("build", "shape"), [pytest.param(build, shape, id=name) for name, build, shape in ZOO])
def test_other_peoples_networks_are_planned_as_they_run(build, shape, monkeypatch):
    model = fuse(build())
    plans = site_plans(model, torch.empty(shape, device="meta"))
    assert bool(plans) == any(record.fused for record in explain(model).blocks)
    assert all(decision.reason.strip() for decision in decisions(plans))
    seen = Seen(model, monkeypatch)
    model(torch.randn(shape))
    planned = {site.conv: site.source for site in plans}
    assert {conv: planned[conv] for conv in seen.sources} == seen.sources


def test_shapes_are_those_of_the_images():
    model = BUILDERS["resnet18"](fused=False)
    shapes = conv_shapes(fuse(model), torch.empty(5, 3, 33, 47, device="meta", dtype=torch.bfloat16))
    first, last = shapes["conv1"], shapes["layer4.1.conv2"]
    assert (first.n, first.c, first.h, first.w, first.k) == (5, 3, 33, 47, 64) and first.dtype == torch.bfloat16
    assert (last.h, last.w, last.c) == (2, 2, 512)


def test_a_small_convolution_of_the_cpu_engine_is_a_product():
    model = fuse(BUILDERS["cifar-20"](fused=False), engine="cpu")
    large = plan.LIBRARY if cpu.isa() == "baseline" else plan.OWN
    plans = {size: site_plans(model, torch.empty(1, 3, size, size, device="meta")) for size in (8, 64)}
    assert {site.variant.name for site in plans[8] if site.conv == "layer1.0.conv2"} == {plan.PRODUCT}
    assert {site.variant.name for site in plans[64] if site.conv == "layer1.0.conv2"} == {large}
    assert not any(site.prologue.name == "fused" for site in plans[8])
