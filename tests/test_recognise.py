"""Which user-written blocks are taken for chains, and that looking changes nothing."""

from __future__ import annotations

import copy
import operator
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import fuse
from resnet_fused.eager_blocks import PadShortcut
from resnet_fused.recognise import Refusal, find_chains, recognise
from resnet_fused.spec import ChainSpec, PoolSpec, ShortcutSpec, SiteSpec

IDENTITY = ShortcutSpec("identity")
SITES = (SiteSpec("conv1", "bn1", True), SiteSpec("conv2", "bn2", False))


class Block(nn.Module):
    """Two sites and the usual spare parts; the tests supply the forward."""

    def __init__(self, width: int = 4, out: int = 4, stride: int = 1, **parts: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.act = nn.ReLU()
        self.skip = nn.Sequential()
        self.training_seen: list[bool] = []
        for name, part in parts.items():
            self.add_module(name, part)

    def main(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.skip(x))


Forward = Callable[..., Any]


def make(forward: Forward, *args: Any, **kwargs: Any) -> Block:
    return type("UserBlock", (Block,), {"forward": forward})(*args, **kwargs)


def found(module: nn.Module) -> ChainSpec:
    result = recognise(module)
    assert isinstance(result, ChainSpec), result.reason
    return result


def _statement_relu(b: Block, x: Tensor) -> Tensor:
    out = b.bn1(b.conv1(x))
    b.relu(out)
    out = b.bn2(b.conv2(out))
    out.add_(x)
    F.relu_(out)
    return out


def _plus_equals(b: Block, x: Tensor) -> Tensor:
    identity = x
    out = b.main(x)
    out += b.skip(identity)
    return b.relu(out)


def _clone_first(b: Block, x: Tensor) -> Tensor:
    identity = x.clone()
    x = b.main(x)
    x += identity
    return torch.relu_(x)


def _unused_shape(b: Block, x: Tensor) -> Tensor:
    _batch, _channels, _height, _width = x.shape
    _rows = x.size(0), x.dim()
    return (b.main(x) + x).relu()


SPELLINGS: dict[str, tuple[bool, Forward]] = {
    "module, +": (False, lambda b, x: b.act(b.main(x) + x)),
    "shortcut first": (False, lambda b, x: b.act(x + b.main(x))),
    "F.relu": (False, lambda b, x: F.relu(b.main(x) + x)),
    "F.relu in place": (False, lambda b, x: F.relu(b.main(x) + x, inplace=True)),
    "torch.relu": (False, lambda b, x: torch.relu(torch.add(b.main(x), x))),
    "method": (False, lambda b, x: b.main(x).add(x).relu()),
    "alpha 1": (False, lambda b, x: torch.add(b.main(x), x, alpha=1).relu_()),
    "iadd": (True, lambda b, x: operator.iadd(b.main(x), x).relu_()),
    "add_": (True, lambda b, x: torch.relu_(b.main(x).add_(x))),
    "+=": (True, _plus_equals),
    "statements": (True, _statement_relu),
    "clone": (True, _clone_first),
    "unused shape": (False, _unused_shape),
    "variadic": (False, lambda b, *x: b.act(b.main(x[0]) + x[0])),
    "default arguments": (False, lambda b, x, scale=None, *rest, **more: b.act(b.main(x) + x) if scale is None else x),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_the_same_chain(name: str) -> None:
    inplace, forward = SPELLINGS[name]
    spec = found(make(forward))
    assert (spec.sites, spec.shortcut, spec.relu, spec.inplace_add) == (SITES, IDENTITY, True, inplace)


def test_no_relu_at_the_end() -> None:
    assert found(make(lambda b, x: b.main(x) + x)).relu is False


def test_inner_names_what_is_called() -> None:
    assert found(make(_plus_equals)).inner == ("relu", "skip")
    assert found(make(SPELLINGS["module, +"][1])).inner == ("relu", "act")


def projection(bias: bool = False, bn: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=bias), *([nn.BatchNorm2d(8)] if bn else []))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_projection_shortcuts(bias: bool, bn: bool, first: bool) -> None:
    forward = (lambda b, x: b.act(b.skip(x) + b.main(x))) if first else Block.forward
    spec = found(make(forward, 4, 8, 2, skip=projection(bias, bn)))
    assert spec.shortcut == ShortcutSpec("projection", SiteSpec("skip.0", "skip.1" if bn else None, False))
    assert spec.sites == SITES and "skip" in spec.inner


def test_of_two_single_sites_the_first_is_the_main_path() -> None:
    block = make(lambda b, x: b.bn1(b.conv1(x)) + b.bn2(b.conv2(x)))
    assert found(block).sites == (SiteSpec("conv1", "bn1", False),)
    assert found(block).shortcut.site == SiteSpec("conv2", "bn2", False)
    block = make(lambda b, x: b.conv1(x) + b.bn2(b.conv2(x)))
    assert found(block).sites == (SiteSpec("conv2", "bn2", False),)
    assert found(block).shortcut.site == SiteSpec("conv1", None, False)


def test_in_place_on_a_projection_is_allowed() -> None:
    def forward(b: Block, x: Tensor) -> Tensor:
        identity = b.skip(x)
        identity += b.main(x)
        return F.relu(identity)

    spec = found(make(forward, 4, 8, 2, skip=projection()))
    assert spec.inplace_add and spec.sites == SITES
    ops = pytest.importorskip("torchvision.ops", reason="FrozenBatchNorm2d is torchvision's")
    promoting = make(forward, 4, 8, 2, skip=projection(), bn2=ops.FrozenBatchNorm2d(8))  # its affine is float32
    assert recognise(promoting) == Refusal("the add is in place on the shortcut, not on the main path")


PADS: dict[str, tuple[int, Forward]] = {
    "end": (0, lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4))),
    "symmetric": (2, lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)),
    "ellipsis": (1, lambda x: F.pad(x[..., ::2, ::2], [0, 0, 0, 0, 1, 3], mode="constant", value=0.0)),
    "pad first": (2, lambda x: F.pad(x, (0, 0, 0, 0, 2, 2))[:, :, 0::2, 0::2]),
    "module": (1, PadShortcut(2, 1, 8)),
}


class LambdaLayer(nn.Module):
    """As written for CIFAR: a module around a function."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", PADS)
def test_option_a_shortcuts(name: str) -> None:
    offset, function = PADS[name]
    skip = function if isinstance(function, nn.Module) else LambdaLayer(function)
    spec = found(Block(4, 8, 2, skip=skip))
    assert spec.shortcut == ShortcutSpec("pad", None, 2, offset)
    assert "skip" in spec.inner


def test_plain_chains_and_stems() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    sites = (SiteSpec("0", "1", True), SiteSpec("3", "4", False))
    assert found(nn.Sequential(*layers)) == ChainSpec(sites, relu=False, inner=("2",))
    stem = nn.Sequential(*layers[:3], nn.Identity(), nn.MaxPool2d(3, 2, 1))
    pooled = ChainSpec((SiteSpec("0", "1", True),), pool=PoolSpec((3, 3), (2, 2), (1, 1)), inner=("2", "3", "4"))
    assert found(stem) == pooled
    functional = make(lambda b, x: F.max_pool2d(F.relu(b.bn1(b.conv1(x))), 2, padding=1))
    assert found(functional).pool == PoolSpec((2, 2), (2, 2), (1, 1))


def test_norm_and_padding_varieties() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="FrozenBatchNorm2d is torchvision's")
    assert found(Block(bn1=ops.FrozenBatchNorm2d(4), bn2=nn.SyncBatchNorm(4))).sites == SITES
    assert found(Block(conv1=nn.Conv2d(4, 4, 3, padding="same", dilation=2))).sites == SITES
    assert found(nn.Sequential(nn.Conv2d(4, 4, 3, padding="valid"), nn.BatchNorm2d(4, affine=False))).relu is False


class Careless(Block):
    """A forward that leaves traces of itself wherever it can."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Any] = []
        self.scale = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.seen.append(x)
        torch.rand(1), random.random(), numpy.random.rand()
        self.scale.mul_(2)
        self.calls.add_(1)
        return super().forward(x)


def _snapshot(module: nn.Module) -> list[Any]:
    """All of a module tree that tracing could disturb, in comparable form."""
    parts: list[Any] = [torch.random.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())]
    parts += [torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.is_grad_enabled()]
    for m in module.modules():
        parts += [id(m), type(m), m.training, list(m.__dict__), {k: id(v) for k, v in m.__dict__.items()}]
        parts += [list(v) for v in m.__dict__.values() if isinstance(v, (dict, list))]
        parts += [id(t) for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    parts += [(name, t._version, t.tolist()) for name, t in module.state_dict().items()]
    return parts


@pytest.mark.parametrize("build", [Block, Careless], ids=["chain", "careless"])
def test_nothing_is_touched(build: type[Block]) -> None:
    module = build()
    module.bn1.eval()
    module.skip.eval()
    fired: list[object] = []
    handles = [
        module.register_forward_hook(lambda *a: fired.append(a)),
        module.conv1.register_forward_pre_hook(lambda *a: fired.append(a)),
        module.skip.register_forward_hook(lambda *a: fired.append(a)),
        module.relu.register_full_backward_hook(lambda *a: fired.append(a)),
        nn.modules.module.register_module_forward_hook(lambda *a: fired.append(a)),
    ]
    try:
        before = _snapshot(module)
        result = recognise(module)
        list(find_chains(module))
        assert _snapshot(module) == before
    finally:
        for handle in handles:
            handle.remove()
    assert not fired
    assert isinstance(result, ChainSpec) == (build is Block)
    if build is Careless:
        assert module.scale.item() == 1 and not module.seen and not hasattr(module, "last")


def test_modes_around_do_not_matter() -> None:
    with torch.no_grad(), torch.autocast("cpu"):
        assert found(Block()).sites == SITES
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    with torch.inference_mode():
        assert found(Block().to("meta")).sites == SITES


def test_spec_is_pickled_and_survives_copies_and_conversion() -> None:
    block = Block(4, 8, 2, skip=projection())
    spec = found(block)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert found(copy.deepcopy(block)) == spec
    assert found(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))) == spec
    assert all(isinstance(block.get_submodule(path), nn.Module) for path in spec.paths())


def test_a_fused_block_is_still_recognised() -> None:
    block = Block(4, 8, 2, skip=projection())
    spec = found(block)
    fused = fuse(nn.Sequential(block))[0]
    assert type(fused) is not Block and found(fused) == spec


def test_a_subclass_of_a_fused_class_is_read_by_its_own_forward() -> None:
    cls = type(fuse(nn.Sequential(Block()))[0])
    inherits = type("Inherits", (cls,), {})()
    overrides = type("Overrides", (cls,), {"forward": lambda b, x: b.main(x)})()
    assert found(inherits).shortcut == IDENTITY
    assert found(overrides).shortcut == ShortcutSpec("none")
