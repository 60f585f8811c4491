"""Forward and backward of single blocks on the CPU, float32, at the sizes they have in ResNet-18 and ResNet-50.

python -m pytest benchmarks/test_bench_blocks.py --benchmark-quiet --benchmark-json=benchmarks/results/blocks.json
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fused.eager import BasicBlock, Bottleneck, PadShortcut, Stem, conv1x1


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


# The image is as many times larger than the block's input as the second number says.
BLOCKS = {
    "stem 7x7": (lambda: Stem(), 3, 1),
    "basic 64": (lambda: BasicBlock(64, 64), 64, 4),
    "basic 64-128, stride 2, B": (lambda: BasicBlock(64, 128, 2, projection(64, 128, 2)), 64, 4),
    "basic 64-128, stride 2, A": (lambda: BasicBlock(64, 128, 2, PadShortcut(2, 0, 128)), 64, 4),
    "basic 512": (lambda: BasicBlock(512, 512), 512, 32),
    "bottleneck 256": (lambda: Bottleneck(256, 64), 256, 4),
    "bottleneck 256-512, stride 2": (lambda: Bottleneck(256, 128, 2, projection(256, 512, 2)), 256, 4),
    "bottleneck 1024": (lambda: Bottleneck(1024, 256), 1024, 16),
    "bottleneck 2048": (lambda: Bottleneck(2048, 512), 2048, 32),
}


QUICK = ("basic 64", "bottleneck 256")
# Compiling takes longer than all the rest of a block, so one of each kind is compiled.
COMPILED = ("stem 7x7", "basic 64-128, stride 2, B", "bottleneck 256", "bottleneck 256-512, stride 2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.quick] if name in QUICK else []) for name in BLOCKS]
)
def test_block(name, blocks, baselines, request):
    torch.manual_seed(0)
    build, channels, shrink = BLOCKS[name]
    batch, size = request.config.option.batch, max(1, request.config.option.image // shrink)
    others = tuple(other for other in baselines if other != "compile" or name in COMPILED)
    blocks(name, build(), torch.randn(batch, channels, size, size, requires_grad=channels > 3), others)
