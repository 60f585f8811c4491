"""A small model for every row of the source architectures whose numbers can be compared, by the row's name.

``-literal``: as the source's text computes it; ``-fixed``: as it was meant. Rows without either are both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from resnet_fused.eager import BasicBlock, Bottleneck, ResNet, StemConfig
from resnet_fused.resnet import cifar_resnet, from_stages

from . import source_a as a
from . import source_b as b
from . import source_c as c
from . import source_d as d
from .literal import RenamedResidualBlock, unpadded_stem
from .zoo import source_a_in_sequential, source_c_fixed, source_d_whole

IMAGE, MAP = (4, 3, 16, 16), (2, 8, 8, 7)
Row = tuple[Callable[[], nn.Module], tuple[int, ...]]
one_block_each = functools.partial(b.ResNet, layers=(1, 1, 1, 1), width=8)
options = functools.partial(ResNet, planes=(8, 16), stem=StemConfig(8, 3, 1, pool=False))

ROWS: dict[str, Row] = {
    "A1": (lambda: nn.Sequential(a.ResidualBlock(8, 8, 1), a.ResidualBlock(8, 16, 2)), MAP),
    "A3-literal": (lambda: RenamedResidualBlock(8, 16, 2), MAP),
    "A3-fixed": (lambda: a.ResidualBlock(8, 16, 2), MAP),
    "A4-fixed": (lambda: RenamedResidualBlock(8, 8, 1), MAP),
    "A5-fixed": (lambda: a.ResidualBlock(8, 8, 1), MAP),
    "A6-fixed": (
        lambda: nn.Sequential(a.BottleneckResidualBlock(8, 3, 16, 2), a.BottleneckResidualBlock(16, 12, 16, 1)),
        MAP,
    ),
    "A7-fixed": (lambda: a.ResNetBase([1, 2], [8, 24], [8, 16], first_kernel_size=3), IMAGE),
    "A8-literal": (lambda: a.ResNetBase([2, 1], [8, 16], first_kernel_size=3), IMAGE),
    "A8-fixed": (lambda: a.ResNetBase([2, 1], [8, 16], first_kernel_size=3, stride_rule="paper"), IMAGE),
    "A9": (lambda: a.ResNetBase([1], [8]), IMAGE),
    "A10": (source_a_in_sequential, IMAGE),
    "A11": (lambda: from_stages([1, 1, 1], [8, 16, 16], [8, 8, 16], stem_kernel=3, fused=False), IMAGE),
    "A12": (lambda: nn.Sequential(RenamedResidualBlock(8, 8, 1), RenamedResidualBlock(8, 12, 1)), MAP),
    "B1": (lambda: nn.Sequential(b.ResidualBlock(8, 8), b.ResidualBlock(8, 16, 2)), MAP),
    "B2": (lambda: nn.Sequential(b.BottleneckBlock(8, 4, 2), b.BottleneckBlock(16, 4)), MAP),
    "B3": (lambda: one_block_each(b.ResidualBlock), IMAGE),
    "B4-literal": (lambda: one_block_each(b.BottleneckBlock), IMAGE),
    "B4-fixed": (lambda: one_block_each(b.BottleneckBlock, num_classes=10), IMAGE),
    "B5": (lambda: one_block_each(b.ResidualBlock, zero_init_residual=True), IMAGE),
    "B8": (lambda: one_block_each(b.ResidualBlock, layers=(1, 2, 1, 1)), IMAGE),
    "C1-fixed": (lambda: c.BuildingBlock(8, 8), MAP),
    "C2-literal": (lambda: c.literal_net(bottleneck=False), MAP),
    "C2-fixed": (lambda: nn.Sequential(c.BuildingBlock(8, 8), c.BuildingBlock(8, 16, 2)), MAP),
    "C3-fixed": (lambda: c.BuildingBlock(8, 8, 2), MAP),
    "C4-literal": (lambda: c.LiteralBuildingBlock(8, 8), MAP),
    "C4-fixed": (lambda: c.BuildingBlock(8, 12), MAP),
    "C5-fixed": (lambda: c.BottleneckBlock(8, 16, 4), MAP),
    "C6-literal": (lambda: c.literal_net(bottleneck=True, width=4), MAP),
    "C6-fixed": (lambda: nn.Sequential(c.BottleneckBlock(8, 16, 4, 2), c.BottleneckBlock(16, 16, 4)), MAP),
    "C7-fixed": (lambda: source_c_fixed(False), (2, 3, 32, 32)),
    "C8-literal": (unpadded_stem, (2, 3, 24, 23)),
    "C8-fixed": (lambda: source_c_fixed(True), (2, 3, 32, 32)),
    "D1": (lambda: nn.Sequential(d.ResidualBlockType1(8, 8), d.ResidualBlockType1(8, 16, 2)), MAP),
    "D2": (lambda: nn.Sequential(d.ResidualBlockType2(8, 4, 2), d.ResidualBlockType2(16, 4)), MAP),
    "D3": (lambda: d.stages(d.ResidualBlockType1, (1, 2), 8), MAP),
    "D4-type1": (lambda: source_d_whole(type2=False), (2, 3, 32, 32)),
    "D4-type2": (lambda: source_d_whole(type2=True), (2, 3, 32, 32)),
    "P2-A": (lambda: cifar_resnet(8, "A", fused=False), IMAGE),
    "P2-A-sym": (lambda: cifar_resnet(8, "A-sym", fused=False), IMAGE),
    "P2-B": (lambda: cifar_resnet(8, "B", fused=False), IMAGE),
    "P2-plain": (lambda: cifar_resnet(8, None, fused=False), IMAGE),
    "P4-A": (lambda: options(Bottleneck, (1, 1), shortcut="A"), IMAGE),
    "P4-A-sym-bias": (lambda: options(Bottleneck, (1, 1), shortcut="A-sym", bias=True), IMAGE),
    "P4-B-bias": (lambda: options(BasicBlock, (1, 1), shortcut="B", bias=True), IMAGE),
    "P4-B-no-bn": (lambda: options(Bottleneck, (1, 1), shortcut="B", shortcut_bn=False), IMAGE),
    "P4-C": (lambda: options(BasicBlock, (2, 1), shortcut="C"), IMAGE),
    "P4-C-no-bn-bias": (lambda: options(BasicBlock, (2, 1), shortcut="C", shortcut_bn=False, bias=True), IMAGE),
}
"""``(factory, input shape)`` by row; the factory draws its parameters from torch's seed."""

# made of the same blocks as other rows, so left to the full run
REPEATS = {"A3-fixed", "A5-fixed", "B4-literal", "B8", "C3-fixed", "C4-fixed", "D4-type1", "P4-A", "P4-B-bias", "P4-C"}
