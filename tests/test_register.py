"""`register_block`: the author names the chain of a block that tracing cannot read, and numbers prove it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import explain, fuse, register_block, unfuse
from resnet_fused.modules import FusedBlock
from resnet_fused.recognise import recognise
from resnet_fused.spec import ShortcutSpec

from .harness import hold_to_law, randomise, step
from .models.source_c import LiteralBuildingBlock
from .models.source_d import ResidualBlockType1
from .test_recognise import projection

X = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(0))


@register_block(conv=["l1", "l2"], bn=["BN1", "BN2"], shortcut="conform_layer")
class Checked(ResidualBlockType1):
    """Source D's block with a look at its values, which no graph has."""

    def forward(self, X: Tensor) -> Tensor:
        if not torch.isfinite(X.sum()):
            raise ValueError("not finite")
        return super().forward(X)


@register_block(conv=["conv1", "conv2"], bn=["batch", "batch"], shortcut=("down", "batch"), post="batch")
class CheckedLiteral(LiteralBuildingBlock):
    def forward(self, x: Tensor) -> Tensor:
        assert bool(x.shape[0] >= 0) and float(x.detach().abs().sum()) >= 0
        return super().forward(x)


class Parts(nn.Module):
    """Spare parts of a block; the tests register subclasses."""

    def __init__(self, skip: nn.Module | None = None, out: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, out, 3, 1 if skip is None else 2, 1)
        self.bn1 = nn.BatchNorm2d(out)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out += x if self.skip is None else self.skip(x)
        return F.relu(out) if float(x.detach().sum()) == float(x.detach().sum()) else out


def named(**options: Any) -> type[Parts]:
    """A registered subclass of `Parts`."""
    forward = options.pop("forward", Parts.forward)
    names = {"conv": ["conv1"], "bn": ["bn1"], "shortcut": "skip", "add": "inplace", **options}
    return register_block(**names)(type("Named", (Parts,), {"forward": forward}))


@pytest.mark.parametrize("block", [Checked(4, 4), Checked(4, 8, 2), CheckedLiteral(4, 6, True)])
def test_a_registered_block_is_fused_and_equal(block: nn.Module) -> None:
    assert isinstance(hold_to_law(randomise(copy.deepcopy(block)), X, torch.float32), FusedBlock)
    assert explain(fuse(copy.deepcopy(block))).blocks[0].reason.startswith("registered")


def test_without_registration_it_is_left_alone() -> None:
    assert recognise(Parts()).reason.startswith("its forward cannot be traced: TypeError: float()")
    assert isinstance(fuse(named()()), FusedBlock)


@pytest.mark.parametrize("bn", [True, False])
def test_projections_by_path_and_by_pair(bn: bool) -> None:
    by_path = fuse(named()(projection(bn=bn), 8))
    assert isinstance(by_path, FusedBlock)
    site = recognise(by_path).shortcut.site
    assert (site.conv, site.bn) == ("skip.0", "skip.1" if bn else None)
    if bn:
        assert recognise(named(shortcut=("skip.0", "skip.1"))(projection(), 8)).shortcut.site == site
    hold_to_law(randomise(unfuse(by_path)), X, torch.float32)


@pytest.mark.parametrize("skip", [nn.Identity(), nn.Sequential(), nn.Sequential(nn.Identity())])
def test_identities_of_all_kinds(skip: nn.Module) -> None:
    block = named(forward=lambda b, x: F.relu(b.bn1(b.conv1(x)) + b.skip(x)), add="outplace")()
    block.skip = skip
    assert recognise(block).shortcut == ShortcutSpec("identity") and isinstance(fuse(block), FusedBlock)


def test_no_shortcut_and_no_relu() -> None:
    block = named(forward=lambda b, x: b.bn1(b.conv1(x)), shortcut=False, relu_last=False)()
    assert recognise(block).shortcut.kind == "none" and not recognise(block).sites[0].relu
    assert isinstance(fuse(block), FusedBlock)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "relu": ({"relu_last": False}, "in training mode with channels_last input, the output differs"),
    "shortcut": ({"shortcut": False}, "in training mode with channels_last input, the output differs"),
    "norm after the add": ({"post": "bn1"}, "in training mode with channels_last input, the output differs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_named_is_not_believed(name: str) -> None:
    options, text = WRONG[name]
    block = fuse(named(**options)())
    assert not isinstance(block, FusedBlock)
    assert text in explain(block).blocks[0].reason


def test_known_blocks_that_are_registered_are_proven_too() -> None:
    from resnet_fused.eager_blocks import BasicBlock

    wrong = register_block(conv=["conv1", "conv2"], bn=["bn2", "bn1"])(type("Swapped", (BasicBlock,), {}))
    assert "differs" in explain(fuse(wrong(4, 4))).blocks[0].reason


def test_a_subclass_with_its_own_forward_is_not_registered() -> None:
    inherits = type("Inherits", (Checked,), {})(4, 4)
    overrides = type("Overrides", (Checked,), {"forward": lambda b, x: b.BN1(b.l1(x))})(4, 4)
    assert explain(fuse(inherits)).blocks[0].reason == "registered"
    assert recognise(overrides).shortcut.kind == "none"


def test_sizes_that_cannot_match_are_refused_in_words() -> None:
    block = named()()
    block.conv1 = nn.Conv2d(4, 4, 3)
    assert "which cannot be added" in explain(fuse(block)).blocks[0].reason


def test_copies_pickles_and_unfuse() -> None:
    block = fuse(randomise(Checked(4, 4)))
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert isinstance(twin, FusedBlock)
        assert torch.equal(step(twin, X)["output"], step(copy.deepcopy(block), X)["output"])
    assert type(unfuse(block)) is Checked


def test_a_hook_makes_the_forward_run_as_it_was_written() -> None:
    block = fuse(Checked(4, 4))
    block.l2.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hook on l2"), pytest.raises(ValueError, match="not finite"):
        block(torch.full((1, 4, 3, 3), float("nan")))


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "conv": ({"conv": ["l3"]}, r"conv: expected the path of a module of Named \(it has conv1, bn1\), got 'l3'"),
    "no conv": ({"conv": ["bn1"]}, "conv: expected an nn.Conv2d at 'bn1' of Named, got BatchNorm2d"),
    "bn": ({"bn": ["BN1"]}, r"bn: expected the path of a module of Named .*got 'BN1'"),
    "bn that is None": ({"bn": ["skip"]}, "bn: expected a batch norm at 'skip' of Named, got NoneType"),
    "post": ({"post": "conv1"}, "post: expected a batch norm at 'conv1' of Named, got Conv2d"),
    "shortcut": ({"shortcut": "down"}, r"shortcut: expected the path of a module of Named .*got 'down'"),
    "pair": ({"shortcut": ("conv1", "conv1")}, "shortcut: expected a batch norm at 'conv1' of Named, got Conv2d"),
    "kind": ({"shortcut": "bn1"}, "shortcut: expected a convolution, .* at 'bn1' of Named, got BatchNorm2d"),
}


@pytest.mark.parametrize("call", [fuse, explain, recognise], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", UNKNOWN)
def test_names_that_an_instance_does_not_have(name: str, call: Any) -> None:
    options, text = UNKNOWN[name]
    with pytest.raises(ValueError, match=f"register_block: {text}"):
        call(named(**options)())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"conv": "conv1"}, TypeError, "conv: expected a sequence of module paths, got 'conv1'"),
        ({"bn": [1]}, TypeError, r"bn: expected a sequence of module paths, got \[1\]"),
        ({"conv": []}, ValueError, "conv: expected at least one module path"),
        ({"bn": ["bn1", "bn1"]}, ValueError, "bn: expected 1 module paths, one for each conv, got 2"),
        ({"shortcut": 3}, TypeError, "shortcut: expected a path, a pair of paths, None or False, got 3"),
        ({"add": "inline"}, ValueError, r"add: expected one of .*got 'inline'"),
        ({"shortcut": False, "post": "bn1"}, ValueError, "shortcut: expected one beside post or shortcut_first"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"register_block: {text}"):
        named(**options)


def test_it_decorates_modules_only() -> None:
    with pytest.raises(TypeError, match=r"register_block: expected a subclass of torch\.nn\.Module, got 3"):
        resnet_fused.register_block(conv=["a"], bn=["b"])(3)  # type: ignore[type-var]
