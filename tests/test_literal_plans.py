"""What `explain`, plans and costs say of literal blocks, what these keep, and our kernels in them."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from resnet_fused import explain, fuse
from resnet_fused.benching.rivals import RivalBlock, replace_norms
from resnet_fused.costs import step_costs
from resnet_fused.eager_blocks import PlainBlock
from resnet_fused.siteplan import site_plans

from .harness import hold_to_law, randomise
from .models.source_c import BuildingBlock, LiteralBuildingBlock, literal_net
from .test_chain import kept_for_backward
from .test_literal import BLOCKS, block_of, shortcut_first
from .test_recognise import make
from .test_siteplan import Seen


def test_explain_names_the_shared_norm_and_what_is_never_used() -> None:
    reasons = [record.reason for record in explain(fuse(literal_net(False))).blocks]
    unused = "down.weight, down.bias never used: DDP needs find_unused_parameters=True"
    assert reasons == [
        f"recognised; batch norm 'batch' is used 3 times: literal mode; {unused}",
        "recognised; batch norm 'batch' is used 4 times: literal mode",
        f"recognised; batch norm 'batch' is used 3 times: literal mode; {unused}",
    ]
    lean = explain(fuse(BLOCKS["own-norm-after-the-add"][0](), memory="lean")).blocks[0].reason
    assert lean == "recognised; batch norm 'late' follows the add: literal mode; kept for backward as in \"speed\""


@pytest.mark.parametrize("bottleneck", [False, pytest.param(True, marks=pytest.mark.full)])
def test_plans_and_costs_of_literal_nets(bottleneck: bool) -> None:
    """Every convolution that runs has a plan and a row; the norm after the add is counted with the site before it."""
    net = literal_net(bottleneck)
    x = torch.randn(2, 16 if bottleneck else 8, 8, 8)
    convs = ["conv1", "conv2", *(["conv3"] if bottleneck else [])]
    expected = [f"{i}.{c}" for i in range(3) for c in (*convs, *(["down"] if i == 1 else []))]
    fused = fuse(copy.deepcopy(net))
    plans = {plan.conv: plan for plan in site_plans(fused, x.to("meta"))}
    assert list(plans) == expected == [site.plan.conv for site in explain(fused, x).sites]
    assert [plans[f"{i}.conv1"].source for i in range(3)] == ["plain", "join", "join"]
    costs = step_costs(net, x.to("meta"))
    assert costs["speed"].moved == costs["lean"].moved and costs["speed"].kept < costs["stock"].kept


def test_plans_say_what_the_chain_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a literal block a plain one reads its norm pending, and one whose shortcut runs first reads the whole."""
    last = make(shortcut_first, 8, 8, 1, skip=nn.Conv2d(8, 8, 1))
    stage = fuse(nn.Sequential(LiteralBuildingBlock(8, 8), PlainBlock(8, 8), LiteralBuildingBlock(8, 8), last))
    seen = Seen(stage, monkeypatch)
    stage(torch.randn(2, 8, 6, 6))
    planned = {plan.conv: plan.source for plan in site_plans(stage, torch.empty(2, 8, 6, 6, device="meta"))}
    assert seen.sources == planned
    assert [planned[f"{i}.conv1"] for i in range(4)] == ["plain", "pending", "join", "plain"]


@pytest.mark.parametrize("name", ["basic", "basic-down", "bottleneck-down"])
def test_less_is_kept_for_the_backward_than_by_the_stock_block(name: str) -> None:
    block, x = block_of(name)
    # so large that the per-channel vectors are small beside it
    x = torch.randn(2, x.shape[1], 28, 28).contiguous(memory_format=torch.channels_last)
    assert kept_for_backward(fuse(copy.deepcopy(block)), x) < kept_for_backward(block, x)


@pytest.mark.full
@pytest.mark.parametrize("downsample", [False, True])
def test_triton_engine(downsample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels, their compiled PTX executed: one finalise for every use, one pass of statistics over the sum."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from resnet_fused.compiling import offline

    from .engine_harness import running

    if offline.missing_tools():
        pytest.skip(str(offline.missing_tools()))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with running() as launches:
        block = randomise(LiteralBuildingBlock(8, 8, downsample))
        hold_to_law(block, torch.randn(2, 8, 6, 5), torch.float32, engine="triton")
    kernels = Counter(launch.kernel for launch in launches)
    assert kernels["_bn_finalize_kernel"] == (4 if downsample else 3) and kernels["_bn_stats_kernel"] == 1


def test_rivals_leave_literal_blocks_alone() -> None:
    """Their blocks have one batch norm for each convolution, and none after the add."""
    net = replace_norms(nn.Sequential(LiteralBuildingBlock(4, 4), BuildingBlock(4, 4)), lambda bn, _: bn)
    assert [type(block) for block in net] == [LiteralBuildingBlock, RivalBlock]
    with pytest.raises(ValueError, match="no block whose batch norms could be replaced"):
        replace_norms(nn.Sequential(LiteralBuildingBlock(4, 4)), lambda bn, _: bn)
