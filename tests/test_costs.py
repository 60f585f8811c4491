"""What a step costs: the layers add up to the counter, what is kept is what autograd keeps, and batches fit."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_fused import costs, counting, devices, fuse
from resnet_fused.costs import STOCK, Workload, state_bytes
from resnet_fused.resnet import BUILDERS
from resnet_fused.train.memory import kept_for_backward

BF16, LAST = torch.bfloat16, torch.channels_last
NETWORKS = {"resnet18": 64, "resnet50": 64, "cifar-20": 32}
MEMORY = ("speed", "lean", "min")


def images(image: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return counting.meta_images(batch, image, dtype)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return request.param, BUILDERS[request.param](fused=False)


@pytest.fixture(scope="module")
def workload(network):
    name, model = network
    return Workload(model, images(NETWORKS[name]))


def test_the_stock_keeps_what_autograd_keeps(network, workload):
    name, model = network
    x = torch.randn(2, 3, NETWORKS[name], NETWORKS[name]).to(memory_format=LAST)
    assert workload.stock.kept == kept_for_backward(copy.deepcopy(model).to(memory_format=LAST), x)


@pytest.mark.parametrize("memory", MEMORY)
def test_every_memory_mode_keeps_what_autograd_keeps(network, workload, memory):
    name, model = network
    x = torch.randn(2, 3, NETWORKS[name], NETWORKS[name]).to(memory_format=LAST)
    ours = fuse(copy.deepcopy(model).to(memory_format=LAST), memory=memory, engine="cpu")
    counted = workload.fused(memory, "cpu")
    assert counted.kept == kept_for_backward(ours, x)
    assert counted.kept < workload.stock.kept


@pytest.mark.parametrize("memory", MEMORY)
def test_the_layers_add_up_to_the_counter(network, memory):
    name, model = network
    x = images(NETWORKS[name], dtype=BF16)
    cost = Workload(model, x).fused(memory, "triton")
    fused = counting.on_meta(lambda: fuse(copy.deepcopy(model), memory=memory, engine="triton"), BF16)
    step = counting.count_step(fused.to("meta"), x)
    kinds = ("activations", "weights", "partials")
    assert cost.moved == sum(half.moved(kind) for half in (step.forward, step.backward) for kind in kinds)
    assert cost.launches == step.launches + step.operators
    assert cost.kept == sum(step.kept.values()) and cost.alive == step.peak > cost.kept


def _activations(model: torch.nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Bytes of activations that our launches of one step move, by layer."""
    step = counting.count_step(
        fuse(counting.on_meta(lambda: copy.deepcopy(model), BF16), engine="triton").to("meta"), x
    )
    moved: dict[str, int] = {}
    for record in (*step.forward.launches, *step.backward.launches):
        name = step.layers.get(record.owner, "")
        moved[name] = moved.get(name, 0) + sum(record.bytes["activations"])
    return moved


def test_bytes_follow_from_the_tensors_of_a_plain_net():
    """A closed form, layer by layer: what forward, dgrad and wgrad read and write of inner sites, to 2 %."""
    model, x = BUILDERS["plain-20"](fused=False), images(32, 8, BF16)
    outputs = {site.conv: site.elements * 8 * BF16.itemsize for site in Workload(model, x).sites}
    counted = _activations(model, x)
    inner = list(outputs)[:-1]  # the last site's end is the chain's
    for before, name in itertools.pairwise(inner):
        x, y = outputs[before], outputs[name]
        expected = (x + y) + (2 * y + 2 * x) + (2 * y + x)
        assert abs(counted[name] - expected) <= expected / 50, name


def test_a_planted_pass_shows_in_its_layer(monkeypatch):
    from resnet_fused.engines import triton_site
    from resnet_fused.kernels.bn_stats import bn_stats

    genuine = triton_site.conv_fwd

    def wasteful(x, *arguments, **options):
        y, *rest = genuine(x, *arguments, **options)
        bn_stats(y)
        return y, *rest

    model, x = BUILDERS["cifar-20"](fused=False), images(32, 8, BF16)
    before = _activations(model, x)
    monkeypatch.setattr(triton_site, "conv_fwd", wasteful)
    after = _activations(model, x)
    for site in Workload(model, x).sites:
        assert after[site.conv] - before[site.conv] == site.elements * 8 * BF16.itemsize, site.conv


@pytest.fixture(scope="module", params=[("resnet18", 224), ("cifar-20", 32)], ids=str)
def schemes(request):
    name, image = request.param
    return costs.step_costs(BUILDERS[name](fused=False), images(image, 64, BF16))


def test_flops_of_every_scheme_are_those_of_the_convolutions(schemes):
    assert set(schemes) == set(costs.SCHEME_NAMES)
    flops = {scheme: sum(layer.flops for layer in cost.layers) for scheme, cost in schemes.items()}
    assert flops[STOCK] == flops["torch.compile"] and flops["speed"] == flops["lean"]
    # Ours pads the stem's image to four channels, and a filter of seven columns to eight.
    assert 0 <= flops["speed"] - flops[STOCK] < schemes[STOCK].layers[0].flops
    forward = sum(work.flops for layer in schemes["speed"].layers for work in layer.forward)
    assert flops["speed"] < flops["min"] < flops["speed"] + forward


def test_compiled_is_modelled_and_between(schemes):
    assert schemes["torch.compile"].basis == "modelled"
    assert {cost.basis for name, cost in schemes.items() if name != "torch.compile"} == {"counted"}
    assert schemes["speed"].moved < schemes["torch.compile"].moved < schemes[STOCK].moved
    assert schemes["torch.compile"].launches < schemes[STOCK].launches


@pytest.mark.parametrize("scheme", [STOCK, "lean"])
def test_the_largest_batch_fits_and_a_larger_one_does_not(scheme):
    model = BUILDERS["cifar-20"](fused=False)
    device = dataclasses.replace(devices.named("h100"), memory=4 * devices.GIB)

    def cost(batch: int) -> costs.Cost:
        work = Workload(model, images(32, batch, BF16), autocast=True)
        return work.stock if scheme == STOCK else work.fused(scheme, "triton")

    image = 3 * 32 * 32 * 2
    state = state_bytes(model, autocast=True)
    most = cost(8).largest_batch(device, state, image)

    def needed(batch: int) -> float:
        return cost(batch).alive + batch * image + state + devices.GIB

    assert most > 100
    assert abs(needed(most) - device.memory) <= device.memory / 100


def test_a_batch_that_nothing_fits_is_zero():
    cost = Workload(BUILDERS["cifar-20"](fused=False), images(32)).stock
    assert cost.largest_batch(dataclasses.replace(devices.named("t4"), memory=devices.GIB), 1, 1) == 0


def test_state_is_parameters_and_momentum():
    model = torch.nn.Linear(3, 5)
    assert state_bytes(model, autocast=False) == 2 * 4 * 20
    assert state_bytes(model.to(BF16), autocast=True) == 20 * (4 + 4 + 2 + 2)


def test_a_model_without_chains_is_refused():
    with pytest.raises(ValueError, match="no block of the model can be fused"):
        Workload(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), images(8))


def test_the_model_is_not_touched():
    model = BUILDERS["cifar-20"](fused=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    costs.step_costs(model, images(32))
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_grouped_convolution_counts_its_own_products():
    """ResNeXt-50 32x4d: 4.2e9 multiply-adds forward, as published; three times that in a step, but for the image."""
    cost = Workload(BUILDERS["resnext50_32x4d"](fused=False), images(224, 2, BF16)).stock
    forward = sum(work.flops for layer in cost.layers for work in layer.forward)
    assert round(forward / 2 / 2 / 1e8) == 42
    stem = sum(work.flops for work in cost.layers[0].forward)
    assert sum(layer.flops for layer in cost.layers) == 3 * forward - stem
