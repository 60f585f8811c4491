"""Source D: ResNetL. Blocks named ``l1 BN1 ...`` with biases and `F.relu`, shortcuts of a bare 1x1
convolution (no batch norm), and whole nets as nested `nn.Sequential`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ResidualBlockType1(nn.Module):
    """Basic; ``conform_layer`` only where the shape changes."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.l1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1)
        self.l2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.BN1 = nn.BatchNorm2d(channels)
        self.BN2 = nn.BatchNorm2d(channels)
        self.conform_layer = None
        if stride != 1 or in_channels != channels:
            self.conform_layer = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride)

    def forward(self, X: Tensor) -> Tensor:
        Y = F.relu(self.BN1(self.l1(X)))
        Y = self.BN2(self.l2(Y))
        if self.conform_layer is not None:
            X = self.conform_layer(X)
        return F.relu(Y + X)


class ResidualBlockType2(nn.Module):
    """Bottleneck with the stride in the first 1x1; ``conform_layer`` in every block (option C)."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.l1 = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride)
        self.l2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.l3 = nn.Conv2d(channels, channels * self.expansion, kernel_size=1)
        self.BN1 = nn.BatchNorm2d(channels)
        self.BN2 = nn.BatchNorm2d(channels)
        self.BN3 = nn.BatchNorm2d(channels * self.expansion)
        self.conform_layer = nn.Conv2d(in_channels, channels * self.expansion, kernel_size=1, stride=stride)

    def forward(self, X: Tensor) -> Tensor:
        Y = F.relu(self.BN1(self.l1(X)))
        Y = F.relu(self.BN2(self.l2(Y)))
        Y = self.BN3(self.l3(Y))
        X = self.conform_layer(X)
        return F.relu(Y + X)


def stages(
    block: type[ResidualBlockType1] | type[ResidualBlockType2], layers: Sequence[int], in_channels: int
) -> nn.Sequential:
    """One `nn.Sequential` per stage, in one more; the first stage keeps ``in_channels``."""
    channels = in_channels
    out: list[nn.Module] = []
    for i, count in enumerate(layers):
        blocks: list[nn.Module] = []
        for j in range(count):
            blocks.append(block(channels, in_channels * 2**i, stride=2 if i > 0 and j == 0 else 1))
            channels = in_channels * 2**i * block.expansion
        out.append(nn.Sequential(*blocks))
    return nn.Sequential(*out)


def ResNetL(num_layers: int, in_channels: int = 64) -> nn.Sequential:  # noqa: N802 - the source's name
    if num_layers not in LAYERS:
        raise ValueError(f"ResNetL: num_layers: expected one of {tuple(LAYERS)}, got {num_layers}")
    return stages(ResidualBlockType1 if num_layers < 50 else ResidualBlockType2, LAYERS[num_layers], in_channels)


def whole(trunk: nn.Sequential, channels: int, out_channels: int, num_classes: int = 1000) -> nn.Sequential:
    """The source's model: a stem of convolution and pool alone, the trunk, the head."""
    return nn.Sequential(
        nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        trunk,
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(out_channels, num_classes),
    )


def model(num_layers: int) -> nn.Sequential:
    return whole(ResNetL(num_layers), 64, 512 if num_layers < 50 else 2048)
