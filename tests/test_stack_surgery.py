"""What is done to a convolution after fusing is never ignored: new parametrisations, pruning, adapters, forwards."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from resnet_fused import explain, fuse
from tests.stack_cases import gradients, images, pair, same, state


class LowRank(nn.Module):
    """An adapter around a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.base = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, 2, 1, conv.stride, bias=False).to(conv.weight)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False).to(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def swap(make: Callable[[nn.Conv2d], nn.Module]) -> Callable[[nn.Module, str], object]:
    return lambda owner, name: setattr(owner, name, make(getattr(owner, name)))


def on(change: Callable[[nn.Conv2d], object]) -> Callable[[nn.Module, str], object]:
    return lambda owner, name: change(getattr(owner, name))


def subclassed(conv: nn.Conv2d) -> nn.Conv2d:
    conv.__class__ = Doubled
    return conv


def forward_wrapped(conv: nn.Conv2d) -> None:
    """As hooks of accelerate, offloading and quantisation tools do."""
    inner = conv.forward
    conv.forward = types.MethodType(lambda self, x: inner(x) * 2, conv)  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[nn.Module, str], object]] = {
    "weight_norm": on(parametrizations.weight_norm),
    "weight_norm, the old one": on(nn.utils.weight_norm),
    "spectral_norm": on(parametrizations.spectral_norm),
    "spectral_norm, the old one": on(nn.utils.spectral_norm),
    "orthogonal": on(parametrizations.orthogonal),
    "pruning": on(lambda conv: prune.l1_unstructured(conv, "weight", amount=0.5)),
    "adapter": swap(LowRank),
    "subclass": on(subclassed),
    "forward replaced": on(forward_wrapped),
    "sequence": swap(lambda conv: nn.Sequential(conv, nn.Tanh())),
}
PLACES = {"0": "conv1", "1": "conv3", "1.downsample": "0"}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_after_fusing_counts(name: str, place: str) -> None:
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in pair().values():
            torch.manual_seed(2)
            CHANGES[name](model.get_submodule(place), PLACES[place])
            for _ in range(2):
                model(images()).square().sum().backward()
            found.append((gradients(model), state(model)))
    same(found[1][0], found[0][0])
    same(found[1][1], found[0][1])
    assert len([w for w in caught if "runs unfused" in str(w.message)]) == 1
    records = {record.name: record for record in explain(model).blocks}
    assert not records[place[0]].fused and records["1" if place == "0" else "0"].fused


@pytest.mark.parametrize("name", ["weight_norm", "pruning"])
def test_fuse_after_the_change_leaves_the_block_alone(name: str) -> None:
    stock, model = pair().values()
    for net in (stock, model):
        CHANGES[name](net[0], "conv1")
    fuse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(model(images()), stock(images()))
    assert not explain(model).blocks[0].fused


def test_pruning_made_permanent_is_fused_again() -> None:
    stock, model = pair().values()
    for net in (stock, model):
        prune.l1_unstructured(net[0].conv1, "weight", amount=0.5)
        prune.remove(net[0].conv1, "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(model(images()), stock(images()))
    assert all(record.fused for record in explain(model).blocks)


def test_parametrisation_removed_is_fused_again() -> None:
    model = pair()["fused"]
    parametrizations.weight_norm(model[0].conv1)
    assert not explain(model).blocks[0].fused
    nn.utils.parametrize.remove_parametrizations(model[0].conv1, "weight")
    assert all(record.fused for record in explain(model).blocks)


def test_a_weight_that_is_no_parameter_any_more() -> None:
    """As `torch.nn.utils.stateless` and hypernetworks do: gradients go to whatever made the weight."""
    found = []
    for model in pair().values():
        seed = model[0].conv1.weight.detach().clone().requires_grad_()
        del model[0].conv1.weight
        model[0].conv1.weight = seed * 2
        model(images()).square().sum().backward()
        found.append({"seed": seed.grad, **gradients(model)})
    same(found[1], found[0])
