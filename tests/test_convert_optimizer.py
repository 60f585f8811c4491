"""`convert_optimizer`: training goes on, step for step, in the converted model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import ConversionError, convert, convert_optimizer
from resnet_fused.eager import BasicBlock, ResNet, StemConfig
from tests.models import checkpoints as models
from tests.models import source_b
from tests.test_convert_models import resnetl

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.9, centered=True),
    "plain": lambda params: torch.optim.SGD(params, lr=0.1),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A source and our net of its structure; resnetl registers its parameters in another order than we do."""
    if name == "kuangliu":
        source = models.CIFARNet(source_b.ResidualBlock, (1, 2), 8)
        return source, ResNet(BasicBlock, (1, 2), 10, planes=(8, 16), stem=StemConfig(8, 3, 1, pool=False))
    return resnetl(name == "deep resnetl")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def goes_on(source, theirs, net, ours, **options) -> None:
    """Two more steps of both, from the same state: equal losses, parameters and buffers, to the bit."""
    source_state = source.state_dict()
    net.load_state_dict(copy.deepcopy(convert(source_state)), strict=True)
    ours.load_state_dict(copy.deepcopy(convert_optimizer(theirs.state_dict(), source_state, **options)))
    for step in (2, 3):
        assert torch.equal(train(source, theirs, step), train(net, ours, step))
        there = convert(source.state_dict())
        assert all(torch.equal(value, there[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", ["kuangliu", "resnetl", "deep resnetl"])
def test_training_goes_on(name, make):
    source, net = pair(name)
    theirs = make(source.parameters())
    for step in (0, 1):
        train(source, theirs, step)
    goes_on(source, theirs, net, make(net.parameters()))


def decayed(model: nn.Module, named: bool) -> list[dict]:
    """Two groups as they are usually made: weight decay for weights of more than one dimension."""
    groups = []
    for deep, decay in ((True, 1e-2), (False, 0.0)):
        chosen = [(n, p) for n, p in model.named_parameters() if (p.dim() > 1) == deep]
        groups.append({"params": chosen if named else [p for _, p in chosen], "weight_decay": decay})
    return groups


@pytest.mark.parametrize("named", [True, False])
def test_groups_of_parameters(named):
    source, net = pair("deep resnetl")
    theirs = torch.optim.Adam(decayed(source, named))
    for step in (0, 1):
        train(source, theirs, step)
    names = [n for deep in (True, False) for n, p in source.named_parameters() if (p.dim() > 1) == deep]
    goes_on(source, theirs, net, torch.optim.Adam(decayed(net, named)), names=None if named else names)
    if not named:
        with pytest.raises(ConversionError, match="names: expected the names of the parameters, as there are 2 groups"):
            convert_optimizer(theirs.state_dict(), source.state_dict())


def test_names_follow_and_prefixes_do_not_matter():
    source, net = pair("resnetl")
    theirs = torch.optim.Adam([("module." + name, p) for name, p in source.named_parameters()])
    train(source, theirs, 0)
    there = convert_optimizer(theirs.state_dict(), source.state_dict())
    assert there["param_groups"][0]["param_names"] == [name for name, _ in net.named_parameters()]
    wrapped = {"state_dict": {"module." + key: value for key, value in source.state_dict().items()}}
    again = convert_optimizer(theirs.state_dict(), wrapped)
    assert again["param_groups"] == there["param_groups"]


def test_values_are_carried_not_copied_and_round_trips():
    source, _ = pair("deep resnetl")
    theirs = torch.optim.Adam(source.parameters())
    train(source, theirs, 0)
    state, weights = theirs.state_dict(), source.state_dict()
    there = convert_optimizer(state, weights)
    assert {id(v) for v in there["state"].values()} == {id(v) for v in state["state"].values()}
    back = convert_optimizer(there, convert(weights), dst="resnetl")
    assert back["param_groups"] == state["param_groups"] and [*back["state"]] == [*state["state"]]
    assert all(back["state"][i] is state["state"][i] for i in state["state"])


def test_a_dropped_classifier_leaves_its_moments_out():
    source, _ = pair("kuangliu")
    theirs = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    train(source, theirs, 0)
    there = convert_optimizer(theirs.state_dict(), source.state_dict(), drop="fc")
    headless = ResNet(BasicBlock, (1, 2), None, planes=(8, 16), stem=StemConfig(8, 3, 1, pool=False))
    torch.optim.SGD(headless.parameters(), lr=0.1, momentum=0.9).load_state_dict(there)
    assert len(there["state"]) == len(theirs.state_dict()["state"]) - 2


def test_parameters_without_state_and_state_without_parameters():
    source, _ = pair("resnetl")
    theirs = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    source[0].requires_grad_(False)
    train(source, theirs, 0)
    state = theirs.state_dict()
    state["state"]["shared"] = {"step": 1}
    there = convert_optimizer({**state, "version": 3}, source.state_dict())
    assert there["version"] == 3 and there["state"]["shared"] == {"step": 1}
    assert len(there["state"]) == len(state["state"]) and 0 not in there["state"]


def test_refusals():
    source, _ = pair("resnetl")
    theirs = torch.optim.Adam(source.parameters())
    train(source, theirs, 0)
    state, weights = theirs.state_dict(), source.state_dict()
    names = [name for name, _ in source.named_parameters()]
    with pytest.raises(ConversionError, match=r"optimizer: expected a state dict with state and param_groups, got \["):
        convert_optimizer(weights, weights)
    with pytest.raises(ConversionError, match=rf"names: expected {len(names)}, one for each .*, got {len(names) - 1}"):
        convert_optimizer(state, weights, names=names[1:])
    with pytest.raises(ConversionError, match="names: 'foo' is no key of state_dict"):
        convert_optimizer(state, weights, names=["foo", *names[1:]])
    with pytest.raises(ConversionError, match=r"exp_avg of fc.weight: expected shape \(5, 16\), got \(5,\)"):
        convert_optimizer(state, weights, names=[*names[:-2], names[-1], names[-2]])
    part = torch.optim.Adam(source[2].parameters())
    with pytest.raises(ConversionError, match="one for each parameter of the optimizer"):
        convert_optimizer(part.state_dict(), weights)
