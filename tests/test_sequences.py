"""Sequences within sequences: stages in them are one chain, and a stem at their head is fused."""

from __future__ import annotations

import copy

import torch
from torch import nn

from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules import FusedStage
from resnet_fused.nets import FusedNet

from .harness import hold_to_law, randomise
from .test_recognise import Block
from .test_runs import X, nodes


def test_nested_sequences_are_one_chain() -> None:
    """As in source D: a bare stem, stages within stages, one block in a sequence of its own."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.Sequential(Block(8, 8)), nn.Sequential(), nn.Sequential(Block(8, 8), Block(8, 8))),
        nn.Flatten(),
    )
    fused = hold_to_law(randomise(net), X, torch.float32)
    assert isinstance(fused, FusedStage) and isinstance(fused[1], FusedStage) and type(fused[1][0]) is nn.Sequential
    assert nodes(fused(X)).count("ClosedSiteFunctionBackward") == 0  # the blocks end in the next one's first site
    assert [site.plan.source for site in explain(fused, X).sites[::2]] == ["plain", "join", "join"]
    seen: list[str] = []
    fused[1][2].register_forward_hook(lambda *_: seen.append("stage"))
    torch.testing.assert_close(fused(X), unfuse(copy.deepcopy(fused))(X))
    assert seen == ["stage", "stage"]
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), unfuse(copy.deepcopy(fused))(X))


def test_a_sequence_with_a_stem_and_stages() -> None:
    stem = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    net = nn.Sequential(*stem, nn.Sequential(Block(8, 8), Block(8, 8)), nn.Sequential(Block(8, 8), Block(8, 8)))
    fused = hold_to_law(randomise(net), X, torch.float32)
    assert isinstance(fused, FusedNet) and isinstance(fused[4], FusedStage)
    fused = fuse(nn.Sequential(*stem, Block(8, 8), Block(8, 8)))
    assert isinstance(fused, FusedStage)
    (record,) = [r for r in explain(fused).blocks if not r.fused]
    assert (record.name, record.reason) == ("0", "its container runs the blocks next to it as one chain")
