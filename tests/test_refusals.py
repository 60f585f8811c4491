"""Blocks that are not chains, and the words in which they are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_fused.recognise import Refusal, recognise
from resnet_fused.spec import ChainSpec

from .test_recognise import Block, LambdaLayer, make


def reason(module: nn.Module) -> str:
    result = recognise(module)
    assert isinstance(result, Refusal), result
    assert "\n" not in result.reason
    return result.reason


def _modifies_input(b: Block, x: Tensor) -> Tensor:
    identity = x
    identity += b.main(x)
    return identity


def _shortcut_in_the_middle(b: Block, x: Tensor) -> Tensor:
    out = b.act(b.bn1(b.conv1(x)))
    identity = b.bn1(b.conv3(x))
    return b.act(b.bn1(b.conv2(out)) + identity)


def _two_modes(b: Block, x: Tensor) -> Tensor:
    return F.relu(b.main(x) + x) if b.training else b.main(x) + x


def _own_autocast(b: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.relu(b.main(x) + x)


class Keeps(nn.Module):
    """A child whose forward does something to its attributes as well."""

    def __init__(self, keep: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.scale = torch.zeros(())
        self.seen: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {}
        self.times = 0
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        self.keep(self, x)
        return x


KEEPERS: dict[str, Callable[[Any, Tensor], object]] = {
    "_buffers": lambda m, x: m.count.add_(1),
    "scale": lambda m, x: m.scale.add_(1),
    "seen": lambda m, x: m.seen.append(x),
    "by_name": lambda m, x: m.by_name.update(x=x),
    "times": lambda m, x: setattr(m, "times", m.times + 1),
    "last": lambda m, x: setattr(m, "last", x),
}


@pytest.mark.parametrize("attribute", KEEPERS)
def test_forwards_with_side_effects(attribute: str) -> None:
    block = Block(skip=Keeps(KEEPERS[attribute]))
    assert reason(block) == f"its forward changes the attribute 'skip.{attribute}', which a chain would not do"
    with torch.inference_mode():
        assert "changes the attribute" in reason(block)
    assert isinstance(recognise(Block(skip=Keeps(lambda m, x: None))), ChainSpec)


def _enable_grad(b: Block, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return F.relu(b.main(x) + x)


def _no_grad(b: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = b.bn1(b.conv1(x))
    return F.relu(out)


class StochasticDepth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 2 else x * 0


class Odd(nn.Conv2d):
    pass


class Called(nn.ReLU):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x)


def _compiled() -> Block:
    block = Block()
    block.relu.compile(backend="eager")
    return block


def _instance_forward() -> Block:
    block = Block()
    block.bn1.forward = lambda x: x  # type: ignore[method-assign]
    return block


STRANGER = nn.ReLU()

REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shared bn on the input": (
        lambda: make(lambda b, x: F.relu(b.bn1(b.bn1(b.conv2(F.relu(b.bn1(b.conv1(x))))) + b.bn1(x)))),
        "pre-activation order: batch norm 'bn1' reads the block's input",
    ),
    "shared bn in the middle": (
        lambda: make(_shortcut_in_the_middle, conv3=nn.Conv2d(4, 4, 1)),
        "the shortcut uses batch norm 'bn1' between two convolutions of the main path that share it",
    ),
    "shared bn of two widths": (
        lambda: make(lambda b, x: b.bn1(b.act(b.bn1(b.conv1(x)))), 4, 4, bn1=nn.BatchNorm2d(5)),
        "batch norm 'bn1' follows a ReLU, not a convolution",
    ),
    "shared conv": (
        lambda: make(lambda b, x: b.bn2(b.conv1(b.bn1(b.conv1(x))))),
        "convolution 'conv1' is used 2 times in one forward",
    ),
    "pre-activation": (
        lambda: make(lambda b, x: b.conv2(b.relu(b.bn2(b.conv1(b.relu(b.bn1(x)))))) + x),
        "pre-activation order: batch norm 'bn1' reads the block's input",
    ),
    "conv then relu": (
        lambda: make(lambda b, x: b.bn2(b.conv2(b.act(b.conv1(x))))),
        "convolution 'conv1' is followed by a ReLU, not by a batch norm",
    ),
    "conv then conv": (
        lambda: make(lambda b, x: b.bn2(b.conv2(b.conv1(x)))),
        "convolution 'conv1' is followed by convolution 'conv2', not by a batch norm",
    ),
    "conv then add": (lambda: make(lambda b, x: b.conv1(x) + x), "convolution 'conv1' is followed by the add"),
    "bn after a bn": (
        lambda: make(lambda b, x: b.bn2(b.bn1(b.conv1(x)))),
        "batch norm 'bn2' follows batch norm 'bn1', not a convolution",
    ),
    "conv after the add": (
        lambda: make(lambda b, x: b.bn2(b.conv2(b.bn1(b.conv1(x)) + x))),
        "convolution 'conv2' reads an add, which is not the end of a conv-BN-ReLU chain",
    ),
    "features after the add": (
        lambda: make(lambda b, x: b.late(b.main(x) + x), late=nn.BatchNorm2d(3)),
        "batch norm 'late' has 3 features for 4 channels",
    ),
    "pool after a bn after the add": (
        lambda: make(lambda b, x: F.max_pool2d(b.act(b.bn1(b.main(x) + x)), 2)),
        "a max pool follows the shortcut's add",
    ),
    "relu before the add": (
        lambda: make(lambda b, x: b.act(b.main(x)) + x),
        "the add reads a ReLU, which is not the end of a conv-BN-ReLU chain",
    ),
    "relu in the shortcut": (
        lambda: make(lambda b, x: b.main(x) + b.act(x)),
        "pre-activation order: a ReLU reads the block's input",
    ),
    "value used elsewhere": (
        lambda: make(lambda b, x: (lambda a: b.bn2(b.conv2(a)) + a)(b.act(b.bn1(b.conv1(x))))),
        "the result of a ReLU is used 2 times",
    ),
    "two branches": (
        lambda: make(
            lambda b, x: b.main(x) + b.bn4(b.conv4(b.bn3(b.conv3(x)))),
            **{f"conv{i}": nn.Conv2d(4, 4, 1) for i in (3, 4)},
            **{f"bn{i}": nn.BatchNorm2d(4) for i in (3, 4)},
        ),
        "both operands of the add are chains, of 2 and 2 convolutions",
    ),
    "unused batch norm": (
        lambda: make(lambda b, x: (b.bn2(b.conv2(x)), F.relu(b.bn1(b.conv1(x))))[1]),
        "the result of batch norm 'bn2' is not used",
    ),
    "input in place": (lambda: make(_modifies_input), "changes the block's input in place"),
    "input in place through an identity": (
        lambda: make(lambda b, x: b.skip(x).add_(b.main(x)), skip=nn.Identity()),
        "changes the block's input in place",
    ),
    "in place on padding": (
        lambda: make(lambda b, x: F.pad(x, (0, 0, 0, 0, 2, 2)).add_(b.main(x)), 4, 8),
        "the add is in place on the shortcut, not on the main path",
    ),
    "two outputs": (lambda: make(lambda b, x: (b.main(x), x)), "does not return exactly one tensor"),
    "two inputs": (lambda: make(lambda b, x, y: b.main(x) + y), "its forward needs a second input 'y'"),
    "keyword input": (lambda: make(lambda b, *, x: b.main(x)), "its forward has no first positional argument"),
    "control flow": (lambda: make(lambda b, x: b.main(x) if x.sum() > 0 else x), "has data-dependent control flow"),
    "broken": (lambda: make(lambda b, x: b.conv_net_1(x)), "cannot be traced: AttributeError: 'UserBlock' object has"),
    "two modes": (lambda: make(_two_modes), "different things in training and in eval mode"),
    "autocast": (lambda: make(_own_autocast), "its forward switches autocast, gradient mode"),
    "no_grad": (lambda: make(_no_grad), "its forward switches autocast, gradient mode"),
    "enable_grad": (lambda: make(_enable_grad), "its forward switches autocast, gradient mode"),
    "checkpoint": (
        lambda: make(lambda b, x: checkpoint(b.main, x, use_reentrant=False) + x),
        "saved-tensor hooks",
    ),
    "random": (lambda: Block(skip=StochasticDepth()), "its forward draws random numbers"),
    "cat": (lambda: make(lambda b, x: torch.cat([b.main(x), x], 1)), "its forward calls cat, which is not part"),
    "squeeze and excite": (
        lambda: make(
            lambda b, x: b.main(x) * b.skip(x) + x,
            skip=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid()),
        ),
        "'skip.0' (AdaptiveAvgPool2d) is not part of a conv-BN-ReLU chain",
    ),
    "function of a child": (
        lambda: make(lambda b, x: b.skip(b.main(x)) + x, skip=LambdaLayer(torch.sigmoid)),
        "'skip' (LambdaLayer) calls sigmoid",
    ),
    "dropout": (lambda: Block(relu=nn.Dropout(0.0)), "'relu' (Dropout) is not part of a conv-BN-ReLU chain"),
    "relu6": (lambda: Block(relu=nn.ReLU6()), "'relu' (ReLU6) is not part of a conv-BN-ReLU chain"),
    "group norm": (lambda: Block(bn1=nn.GroupNorm(2, 4)), "'bn1' (GroupNorm) is not part"),
    "subclass": (lambda: Block(conv1=Odd(4, 4, 3, 1, 1)), "'conv1' (Odd) is not part of a conv-BN-ReLU chain"),
    "only transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)),
        "'0' (ConvTranspose2d) is not exactly nn.Conv2d",
    ),
    "own parameter": (
        lambda: make(lambda b, x: b.main(x) + x + b.conv1.weight),
        "its forward uses 'conv1.weight' directly",
    ),
    "own tensor": (lambda: make(lambda b, x: b.main(x) + x.new_zeros(1)), "its forward calls new_zeros"),
    "constant": (lambda: make(lambda b, x: b.main(x) + torch.ones(1)), "computes with a tensor of its own"),
    "number": (lambda: make(lambda b, x: b.main(x) + 1), "its forward calls add with 1 for a tensor"),
    "alpha": (lambda: make(lambda b, x: torch.add(b.main(x), x, alpha=2)), "its forward adds with alpha=2"),
    "shape": (lambda: make(lambda b, x: b.main(x) + x[:, : x.shape[1] // 2]), "computes with the shape of a tensor"),
    "stranger": (
        lambda: make(lambda b, x, other=STRANGER: other(b.main(x))),
        "calls a ReLU that is not its submodule",
    ),
    "call override": (lambda: Block(relu=Called()), "'relu' (Called) overrides __call__"),
    "instance forward": (_instance_forward, "'bn1' (BatchNorm2d) has its forward replaced on the instance"),
    "compiled": (_compiled, "'relu' (ReLU) is compiled on its own"),
    "scripted": (lambda: Block(relu=torch.jit.script(nn.ReLU())), "is a TorchScript module"),
    "parametrised": (
        lambda: Block(conv1=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, 1, 1))),
        "'conv1' (ParametrizedConv2d) is parametrised",
    ),
    "pruned": (
        lambda: Block(conv1=torch.nn.utils.prune.identity(nn.Conv2d(4, 4, 3, 1, 1), "weight")),
        "'conv1' (Conv2d) computes its weight from others",
    ),
    "padding mode": (
        lambda: Block(conv1=nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect")),
        "'conv1' (Conv2d) pads with reflect, not with zeros",
    ),
    "uneven same": (lambda: Block(conv1=nn.Conv2d(4, 4, 2, padding="same")), "pads unevenly"),
    "complex": (lambda: Block(conv1=nn.Conv2d(4, 4, 3, padding=1, dtype=torch.cfloat)), "has a torch.complex64 weight"),
    "features": (lambda: Block(bn1=nn.BatchNorm2d(5)), "batch norm 'bn1' has 5 features for 4 channels"),
    "channels": (lambda: Block(conv2=nn.Conv2d(6, 4, 3, 1, 1)), "convolution 'conv2' takes 6 channels and gets 4"),
    "broadcast": (lambda: Block(1, 4), "the shortcut adds 1 channels to 4"),
    "unpadded": (
        lambda: Block(conv1=nn.Conv2d(4, 4, 3)),
        "for a 33x33 input the shortcut is 33x33 and the main path 31x31, which cannot be added",
    ),
    "spatial padding": (lambda: make(lambda b, x: b.main(x) + F.pad(x, (1, 1))), "pads otherwise than zero channels"),
    "both paddings": (
        lambda: make(lambda b, x: b.main(x) + F.pad(x, (1, 1, 1, 1, 0, 0))),
        "pads otherwise than zero channels",
    ),
    "odd slice": (lambda: make(lambda b, x: b.main(x) + x[:, :, 1::2, ::2]), "indexes a tensor in another way"),
    "pool without relu": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)),
        "the max pool follows batch norm '1', not a ReLU",
    ),
    "ceil mode": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
        "'3' (MaxPool2d) is dilated, rounds up or returns indices",
    ),
    "pool after the add": (
        lambda: make(lambda b, x: F.max_pool2d(b.act(b.main(x) + x), 2)),
        "a max pool follows the shortcut's add",
    ),
    "nothing": (lambda: nn.Linear(2, 2), "it has no convolution followed by a batch norm"),
    "wrapper": (lambda: nn.DataParallel(Block()), "the DataParallel itself is torch's own wrapper, not a block"),
    "too large": (
        lambda: nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(9))),
        "it is larger than a block: 9 convolutions in 28 modules",
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_thing(name: str) -> None:
    build, text = REFUSALS[name]
    assert text in reason(build())
