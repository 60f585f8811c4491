"""What makes a call cheap changes nothing: the quick structure check, the block that ends in its last site's node."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from resnet_fused import chain, fuse, structure
from resnet_fused.eager_blocks import BasicBlock, Bottleneck, PadShortcut, PlainBlock
from resnet_fused.engines import cpu, cpu_site
from resnet_fused.links import bind, child
from resnet_fused.numerics import assert_law
from tests.harness import randomise, step


def projected() -> nn.Module:
    return Bottleneck(8, 4, 2, nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16)))


class LinearEnd(BasicBlock):
    """No ReLU after the add."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear end": lambda: LinearEnd(8, 8),
    "bottleneck": lambda: Bottleneck(8, 4, out_channels=8),
    "projection": projected,
    "pad": lambda: BasicBlock(8, 16, 2, PadShortcut(2, 4, 16)),
    "plain": lambda: PlainBlock(8, 8),
    "no batch norm": lambda: BasicBlock(8, 16, 1, nn.Sequential(nn.Conv2d(8, 16, 1))),
}


def replace(path: str, made: nn.Module) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(child(block, parent) if parent else block, name, made)

    return change


def hook(path: str, register: str) -> Callable[[nn.Module], None]:
    return lambda block: getattr(child(block, path), register)(lambda *_: None)


class OwnNorm(nn.BatchNorm2d):
    """A batch norm of the user's own."""


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda block: None,
    "eval": lambda block: block.eval(),
    "convolution replaced by its like": replace("conv2", nn.Conv2d(4, 4, 3, 2, 1)),
    "convolution replaced": replace("conv2", nn.Identity()),
    "batch norm replaced": replace("bn2", nn.GroupNorm(2, 4)),
    "batch norm of the user's own": replace("bn2", OwnNorm(4)),
    "shortcut's batch norm replaced": replace("downsample.1", nn.GroupNorm(2, 16)),
    "shortcut removed": lambda block: setattr(block, "downsample", None),
    "child added": lambda block: block.add_module("more", nn.ReLU()),
    "child removed": lambda block: block.__delattr__("relu"),
    "shortcut longer": lambda block: block.downsample.append(nn.ReLU()),
    "forward replaced": lambda block: setattr(block.conv2, "forward", block.conv2.forward),
    "forward hook": hook("conv1", "register_forward_hook"),
    "forward pre-hook": hook("relu", "register_forward_pre_hook"),
    "backward hook": hook("downsample.0", "register_full_backward_hook"),
    "backward pre-hook": hook("downsample", "register_full_backward_pre_hook"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_quick_check_sees_what_the_full_one_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = fuse(projected())
    CHANGES[name](block)
    binding = block.__dict__[structure.BINDING]
    quick = structure.obstacle(block, binding)
    passed = structure._unchanged(block, binding.structure)
    monkeypatch.setattr(structure, "_unchanged", lambda *_: False)
    assert quick == structure.obstacle(block, binding)
    assert passed == (quick is None)


def test_the_quick_check_sees_global_hooks() -> None:
    block = fuse(projected())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert structure.obstacle(block, block.__dict__[structure.BINDING]) == "global module hook"
    finally:
        handle.remove()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_ends_in_its_last_node_is_the_same(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = fuse(randomise(BLOCKS[name]()).train(training))
    assert block.as_link() is not None
    x = torch.randn(2, 8, 5, 4, generator=torch.Generator().manual_seed(0))
    one = step(copy.deepcopy(block), x)
    monkeypatch.setattr(chain, "_closes", lambda link: False)
    other = step(copy.deepcopy(block), x)
    assert one.keys() == other.keys()
    assert [key for key in one if not one[key].equal(other[key])] == []


def node_names(out: torch.Tensor) -> list[str]:
    nodes, todo = {}, [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes[node] = node.name()
            todo += [following for following, _ in node.next_functions]
    return list(nodes.values())


def test_a_block_called_alone_has_a_node_for_every_site() -> None:
    block = fuse(BLOCKS["bottleneck"]())
    names = node_names(block(torch.randn(2, 8, 5, 4)))
    assert names.count("SiteFunctionBackward") == 2
    assert names.count("ClosedSiteFunctionBackward") == 1
    assert "CloseFunctionBackward" not in names


def test_a_batch_norm_that_the_shortcut_shares_moves_in_the_stock_order() -> None:
    stock = randomise(projected())
    block = fuse(copy.deepcopy(stock))
    for model in (stock, block):
        model.bn3 = model.downsample[1]
    assert block.as_link() is not None and not chain._closes(block.as_link())
    x = torch.randn(2, 8, 5, 4)
    ours, theirs, ref = (step(m, y) for m, y in ((block, x), (copy.deepcopy(stock), x), (stock.double(), x.double())))
    assert_law(ours, ref, [theirs], torch.float32)


def test_a_second_derivative_is_refused_by_name() -> None:
    block = fuse(BLOCKS["bottleneck"]())
    x = torch.randn(2, 8, 5, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use resnet_fused\.disable\(\)"):
        grad.sum().backward()


def test_bind_reads_what_stands_in_the_modules_now() -> None:
    block = fuse(BLOCKS["bottleneck"]())
    site = block.__dict__[structure.BINDING].spec.sites[1]
    block.conv2.stride, block.conv2.padding, block.bn2.momentum, block.bn2.eps = (2, 2), "same", None, 1e-2
    block.bn2.weight = nn.Parameter(torch.full((4,), 2.0))
    call, params = bind(block, site, "cpu")
    assert (call.stride, call.padding, call.momentum, call.eps) == ((2, 2), (1, 1), None, 1e-2)
    assert call.training and params.gamma is block.bn2.weight and params.running_mean is block.bn2.running_mean
    block.bn2.eval()
    call, params = bind(block, site, "cpu")
    assert not call.training and params.num_batches_tracked is None
    del block.conv2._parameters["weight"]
    block.conv2.weight = torch.ones(4, 4, 3, 3)
    assert bind(block, site, "cpu")[1].weight is block.conv2.weight


@pytest.mark.skipif(cpu_site._site_fwd is None, reason=f"the CPU library's site ops are not there: {cpu.load()}")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_sites_of_one_op_compile_whole(backend: str) -> None:
    block = fuse(randomise(projected()))
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend=backend)
    x = torch.randn(2, 8, 5, 4, generator=torch.Generator().manual_seed(0))
    expected, got = step(block, x), step(compiled, x)
    assert {key.removeprefix("_orig_mod.") for key in got} == set(expected)
    for key, value in got.items():
        assert value.equal(expected[key.removeprefix("_orig_mod.")]), key
