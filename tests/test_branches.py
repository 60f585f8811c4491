"""Shortcuts that are modules of their own, and convolutions that run their own norm: what is fused around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules import FusedBlock, FusedStage
from resnet_fused.recognise import Refusal, recognise
from resnet_fused.spec import ChainSpec, SiteSpec

from .harness import hold_to_law, randomise
from .models.others import D2Conv2d
from .test_recognise import Block, make

X = torch.randn(2, 4, 8, 7, generator=torch.Generator().manual_seed(6))


class Choice(nn.Module):
    """A shortcut that depends on its data: what else it does cannot be seen."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if x.mean() > 0 else x * 2


def norm_in_front() -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))


BRANCHES: dict[str, Any] = {
    "average pool": norm_in_front,
    "group norm": lambda: nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.GroupNorm(2, 8)),
    "two convolutions": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
    ),
    "gate": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 8, 1), nn.Sigmoid()),
    "batch norm in front": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, 2)),
}


def _inplace(b: Block, x: Tensor) -> Tensor:
    out = b.main(x)
    out += b.skip(x)
    return b.relu(out)


def block(name: str, inplace: bool = False) -> Block:
    torch.manual_seed(0)
    made = make(_inplace, 4, 8, 2, skip=BRANCHES[name]()) if inplace else Block(4, 8, 2, skip=BRANCHES[name]())
    randomise(made)
    return made


@pytest.mark.parametrize("name", BRANCHES)
def test_the_main_path_is_fused(name: str) -> None:
    fused = hold_to_law(block(name), X, torch.float32)
    assert isinstance(fused, FusedBlock)
    spec = recognise(fused)
    assert isinstance(spec, ChainSpec) and spec.shortcut.kind == "module" and spec.shortcut.path == "skip"
    assert len(spec.sites) == 2


@pytest.mark.parametrize("memory", ["lean", "min"])
def test_memory_modes(memory: str) -> None:
    hold_to_law(block("average pool"), X, torch.float32, memory=memory, layout="nchw")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["average pool", pytest.param("group norm", marks=pytest.mark.full)])
def test_autocast_keeps_the_dtype_rule(name: str, inplace: bool) -> None:
    hold_to_law(nn.Sequential(block(name, inplace), Block(8, 8)), X, torch.bfloat16, autocast=True)


def test_in_a_stage_and_in_eval_mode() -> None:
    stage = nn.Sequential(Block(4, 4), block("average pool", inplace=True), Block(8, 8))
    assert isinstance(hold_to_law(stage, X, torch.float64), FusedStage)
    stage.eval()
    with torch.no_grad():
        torch.testing.assert_close(fuse(copy.deepcopy(stage))(X), stage(X))


def test_the_branch_may_neither_depend_on_its_data_nor_draw() -> None:
    assert "'skip' (Choice) has data-dependent" in recognise(Block(4, 4, skip=Choice())).reason  # type: ignore[union-attr]
    drawing = fuse(Block(4, 4, skip=nn.Dropout()))  # what it draws depends on the memory format, which a chain changes
    assert not isinstance(drawing, FusedBlock) and "differs by" in explain(drawing).blocks[0].reason


def test_the_branch_keeps_its_hooks_and_changes() -> None:
    fused, seen = fuse(block("average pool")), []  # type: ignore[var-annotated]
    fused.skip[0].register_forward_hook(lambda *_: seen.append("pool"))
    fused.skip[2] = nn.SyncBatchNorm(8).eval()
    fused.skip[0] = nn.MaxPool2d(2, 2, ceil_mode=True)
    fused.skip[0].register_forward_hook(lambda *_: seen.append("max"))
    torch.testing.assert_close(fused(X), unfuse(copy.deepcopy(fused))(X))
    assert seen == ["max", "max"] and explain(fused).blocks[0].fused


def test_blocks_inside_the_branch_are_fused_too() -> None:
    outer = Block(4, 4, skip=nn.Sequential(Block(4, 4), nn.Dropout(0.0)))
    names = {r.name for r in explain(fuse(outer)).blocks if r.fused}
    assert names == {"", "skip.0"}


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda b, x: F.relu(b.main(x) + b.skip(b.skip(x))), "AvgPool2d"),
        (lambda b, x: F.relu(b.main(b.skip(x)) + x), "AvgPool2d"),
        (lambda b, x: F.relu(b.main(x) * b.skip(x)), "AvgPool2d"),
    ],
)
def test_what_is_not_a_shortcut_is_refused(forward: Any, words: str) -> None:
    found = recognise(make(forward, skip=nn.AvgPool2d(1)))
    assert isinstance(found, Refusal) and words in found.reason


def test_a_branch_that_shares_a_module_with_the_main_path_is_refused() -> None:
    b = Block(4, 4)
    b.skip = nn.Sequential(nn.AvgPool2d(1), b.conv2)
    assert isinstance(recognise(b), Refusal)


class Wrapped(nn.Module):
    """One wrapped convolution in a block of its own."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


def wrapped(forward: Any = None, **options: Any) -> Wrapped:
    cls = D2Conv2d if forward is None else type("Odd", (D2Conv2d,), {"forward": forward})
    return Wrapped(cls(4, 8, 3, norm=nn.BatchNorm2d(8), **options))


def test_a_convolution_with_its_norm_is_a_site() -> None:
    model = wrapped(padding=1, stride=2)
    assert recognise(model).sites == (SiteSpec("conv", "conv.norm", True),)  # type: ignore[union-attr]
    assert isinstance(hold_to_law(randomise(model), X, torch.float32), FusedBlock)
    fused = fuse(model)
    fused.conv.norm.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hook on conv\.norm"):
        fused(X)


ODD: dict[str, tuple[Any, str]] = {
    "padding": (lambda c, x: c.norm(F.conv2d(x, c.weight, c.bias, c.stride, 2)), "another stride, padding"),
    "weight": (lambda c, x: c.norm(F.conv2d(x, c.weight * 2, c.bias)), "calls mul, which is not part"),
    "bias": (lambda c, x: c.norm(F.conv2d(x, c.weight, c.norm.bias)), "convolves with a weight or bias that is not"),
    "own": (lambda c, x: c.norm(F.conv2d(x, c.norm.weight.view(8, 1, 1, 1))), "calls view, which is not part"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_wrapped_convolutions_are_refused(name: str) -> None:
    forward, words = ODD[name]
    found = recognise(wrapped(forward))
    assert isinstance(found, Refusal) and words in found.reason, found


def test_a_wrapped_convolution_alone_is_refused() -> None:
    found = recognise(D2Conv2d(4, 8, 1, norm=nn.BatchNorm2d(8)))
    assert isinstance(found, Refusal) and "convolves with a weight" in found.reason
