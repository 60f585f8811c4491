"""The rows C, D and P of the source architectures, beyond their numbers, which `test_source_rows` compares."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import eager, explain, fuse
from resnet_fused.modules import Fused, FusedBlock
from resnet_fused.numerics import assert_law
from resnet_fused.recognise import recognise

from .harness import randomise, step
from .models import source_c, source_d
from .models.rows import MAP, ROWS
from .test_source_rows import unproven
from .test_sources import count, on_meta

__all__ = ["unproven"]


@pytest.mark.parametrize(("block", "uses"), [(source_c.LiteralBuildingBlock(8, 8), 3), (source_c.LiteralBuildingBlock(8, 8, True), 4)])  # fmt: skip  # noqa: E501
def test_c2_literal_statistics_move_at_every_use(block: nn.Module, uses: int) -> None:
    fused = fuse(block)
    fused(torch.randn(MAP))
    assert int(fused.batch.num_batches_tracked) == uses
    assert f"batch norm 'batch' is used {uses} times: literal mode" in explain(fused).blocks[0].reason


def test_c4_literal_under_ddp(tmp_path: Path) -> None:
    """A step with `down` unused passes as the reason says, and gives the gradients of the net alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        net, x = fuse(source_c.literal_net(bottleneck=False)), torch.randn(MAP)
        alone = step(copy.deepcopy(net), x)
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(net), find_unused_parameters=True)
        step(parallel, x)
        parallel.zero_grad()
        step(parallel, x)
        grads = {f"{name}.grad": p.grad for name, p in parallel.module.named_parameters() if p.grad is not None}
        assert len(grads) == len([name for name in alone if name.endswith(".grad")]) - 1
        for name, grad in grads.items():
            torch.testing.assert_close(grad.double(), alone[name].double())
        unaware = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
        step(unaware, x)
        with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
            step(unaware, x)
    finally:
        torch.distributed.destroy_process_group()


def test_c4_literal_dead_parameters_stay() -> None:
    block = source_c.LiteralBuildingBlock(8, 8)
    keys = list(block.state_dict())
    fused = fuse(block)
    fused(torch.randn(MAP)).sum().backward()
    assert list(fused.state_dict()) == keys and {"down.weight", "down.bias"} < set(keys)
    assert {name for name, p in fused.named_parameters() if p.grad is None} == {"down.weight", "down.bias"}
    text = explain(fused).blocks[0].reason
    assert text.endswith("down.weight, down.bias never used: DDP needs find_unused_parameters=True")


@pytest.mark.parametrize("block", [source_c.BottleneckBlock(8, 16, 4, 2), source_c.LiteralBottleneckBlock(8, 16, 4, True)])  # fmt: skip  # noqa: E501
def test_c6_the_stride_is_in_the_first_1x1(block: nn.Module) -> None:
    assert isinstance(fuse(block), FusedBlock)
    assert [block.conv1.stride, block.conv2.stride] == [(2, 2), (1, 1)]


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_c9_five_architectures(depth: int) -> None:
    """Table 1's nets, with a bias in every convolution."""
    model = on_meta(source_c.ResNet, source_d.LAYERS[depth], depth >= 50)
    biases = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    ours = on_meta(getattr(resnet_fused, f"resnet{depth}"), fused=False)
    assert count(model) - biases == count(ours)


@pytest.mark.parametrize(("block", "convs"), [(source_d.ResidualBlockType1(8, 16, 2), 2), (source_d.ResidualBlockType2(16, 4), 3)], ids=["D1", "D2"])  # fmt: skip  # noqa: E501
def test_d1_d2_projection_without_batch_norm(block: nn.Module, convs: int) -> None:
    """Type 2 has one at stride 1 with equal channels, too."""
    spec = recognise(fuse(block))
    assert spec.shortcut.site.conv == "conform_layer" and spec.shortcut.site.bn is None
    assert len(spec.sites) == convs and block.conform_layer.bias is not None


@pytest.mark.parametrize(
    ("depth", "parameters", "entries"),
    [(18, 11_692_392, 122), (34, 21_804_264, 234)],
)
def test_d3_d4_nested_sequentials(depth: int, parameters: int, entries: int, unproven: None) -> None:
    """Fused, the source's loop over the net prints the same shapes; the stem has nothing to fuse."""
    model = fuse(on_meta(source_d.model, depth))
    assert (count(model), len(model.state_dict())) == (parameters, entries)
    assert "2.0.0.l1.weight" in model.state_dict() and not isinstance(model[0], Fused)
    X, shapes = torch.empty(5, 3, 224, 224, device="meta"), []
    for blk in [*model[:2], *model[2]]:
        X = blk(X)
        shapes.append(tuple(X.shape))
    assert shapes == [(5, 64, 112, 112), *((5, 64 * 2**max(i - 1, 0), 56 // 2**max(i - 1, 0), 56 // 2**max(i - 1, 0)) for i in range(5))]  # fmt: skip  # noqa: E501
    assert sum(isinstance(m, FusedBlock) for m in model.modules()) == sum(source_d.LAYERS[depth])


def test_d5_responses_are_seen_by_hooks() -> None:
    """The deviation of every batch norm's output, before ReLU and add, as a hook measures it in stock."""
    stock = randomise(source_d.stages(source_d.ResidualBlockType1, (1, 1), 8))
    x, seen = torch.randn(MAP), []
    for model in (copy.deepcopy(stock).double(), copy.deepcopy(stock), fuse(stock)):
        found: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda _, __, out, name=name, found=found: found.update({name: out.std()}))
        seen.append(found)
        if isinstance(model[0][0], FusedBlock):
            with pytest.warns(UserWarning, match="hook on"):
                model(x)
        else:
            model(x.to(next(model.parameters()).dtype))
    assert_law(seen[2], seen[0], [seen[1]], torch.float32)
    assert len(seen[2]) == 4


def test_p2_p4_pads_have_two_conventions() -> None:
    for shortcut, offset in (("A", 0), ("A-sym", 4)):
        block = ROWS[f"P2-{shortcut}"][0]().layer2[0]
        assert isinstance(block.downsample, eager.PadShortcut)
        assert recognise(block).shortcut.channel_offset == offset * 2
