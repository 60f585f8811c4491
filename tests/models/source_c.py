"""Source C: building blocks in sequences, biases everywhere, the bottleneck's stride in its first 1x1.

The fixed classes have one batch norm per convolution and none after the add, as the paper has. The
``Literal`` ones share batch norms as the source does, with only what keeps it from running repaired
(padding, and the projection applied to the block's input): the running statistics move three or four
times in a forward, and a batch norm stands between the add and the last ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)


class Projection(nn.Module):
    def __init__(self, ch_in: int, ch_out: int, stride: int) -> None:
        super().__init__()
        self.down = conv(ch_in, ch_out, 1, stride)
        self.batch = nn.BatchNorm2d(ch_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch(self.down(x))


class BuildingBlock(nn.Module):
    def __init__(self, ch_in: int, ch_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(ch_in, ch_out, 3, stride)
        self.batch1 = nn.BatchNorm2d(ch_out)
        self.conv2 = conv(ch_out, ch_out, 3)
        self.batch2 = nn.BatchNorm2d(ch_out)
        self.relu = nn.ReLU()
        self.projection = Projection(ch_in, ch_out, stride) if stride != 1 or ch_in != ch_out else None

    def forward(self, x: Tensor) -> Tensor:
        x_res = x
        x = self.relu(self.batch1(self.conv1(x)))
        x = self.batch2(self.conv2(x))
        if self.projection is not None:
            x_res = self.projection(x_res)
        return self.relu(x + x_res)


class BottleneckBlock(nn.Module):
    def __init__(self, ch_in: int, ch_out: int, ch_mid: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(ch_in, ch_mid, 1, stride)
        self.batch1 = nn.BatchNorm2d(ch_mid)
        self.conv2 = conv(ch_mid, ch_mid, 3)
        self.batch2 = nn.BatchNorm2d(ch_mid)
        self.conv3 = conv(ch_mid, ch_out, 1)
        self.batch3 = nn.BatchNorm2d(ch_out)
        self.relu = nn.ReLU()
        self.projection = Projection(ch_in, ch_out, stride) if stride != 1 or ch_in != ch_out else None

    def forward(self, x: Tensor) -> Tensor:
        x_res = x
        x = self.relu(self.batch1(self.conv1(x)))
        x = self.relu(self.batch2(self.conv2(x)))
        x = self.batch3(self.conv3(x))
        if self.projection is not None:
            x_res = self.projection(x_res)
        return self.relu(x + x_res)


class LiteralBuildingBlock(nn.Module):
    """``batch`` is applied to both convolutions, to the projection, and after the add; ``down`` always exists."""

    def __init__(self, ch_in: int, ch_out: int, downsample: bool = False) -> None:
        super().__init__()
        self.downsample = downsample
        self.conv1 = conv(ch_in, ch_out, 3, 2 if downsample else 1)
        self.conv2 = conv(ch_out, ch_out, 3)
        self.batch = nn.BatchNorm2d(ch_out)
        self.relu = nn.ReLU()
        self.down = conv(ch_in, ch_out, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x_res = x
        x = self.relu(self.batch(self.conv1(x)))
        x = self.batch(self.conv2(x))
        if self.downsample:
            x_res = self.batch(self.down(x_res))
        return self.relu(self.batch(x + x_res))


class LiteralBottleneckBlock(nn.Module):
    """``batch1`` is shared by two convolutions, ``batch2`` by the third, the projection and the sum."""

    def __init__(self, ch_in: int, ch_out: int, ch_mid: int, downsample: bool = False) -> None:
        super().__init__()
        self.downsample = downsample
        self.conv1 = conv(ch_in, ch_mid, 1, 2 if downsample else 1)
        self.conv2 = conv(ch_mid, ch_mid, 3)
        self.conv3 = conv(ch_mid, ch_out, 1)
        self.batch1 = nn.BatchNorm2d(ch_mid)
        self.batch2 = nn.BatchNorm2d(ch_out)
        self.relu = nn.ReLU()
        self.down = conv(ch_in, ch_out, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x_res = x
        x = self.relu(self.batch1(self.conv1(x)))
        x = self.relu(self.batch1(self.conv2(x)))
        x = self.batch2(self.conv3(x))
        if self.downsample:
            x_res = self.batch2(self.down(x_res))
        return self.relu(self.batch2(x + x_res))


class ResNet(nn.Module):
    """``bottleneck`` gives each stage ``4 * channels`` outputs; the stem is the paper's."""

    def __init__(
        self,
        layers: Sequence[int],
        bottleneck: bool,
        num_classes: int = 1000,
        channels: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__()
        self.conv = conv(3, channels[0], 7, 2)
        self.batch = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        ch_in = channels[0]
        sequences: list[nn.Module] = []
        for i, (count, ch_mid) in enumerate(zip(layers, channels)):
            ch_out = 4 * ch_mid if bottleneck else ch_mid
            blocks: list[nn.Module] = []
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                if bottleneck:
                    blocks.append(BottleneckBlock(ch_in, ch_out, ch_mid, stride))
                else:
                    blocks.append(BuildingBlock(ch_in, ch_out, stride))
                ch_in = ch_out
            sequences.append(nn.Sequential(*blocks))
        self.sequences = nn.Sequential(*sequences)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(ch_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.batch(self.conv(x))))
        return self.fc(torch.flatten(self.avgpool(self.sequences(x)), 1))


def literal_net(bottleneck: bool, width: int = 8) -> nn.Sequential:
    """A stage of two identity blocks around one that downsamples, as the source's sequences make them."""
    if bottleneck:
        return nn.Sequential(
            LiteralBottleneckBlock(2 * width, 2 * width, width),
            LiteralBottleneckBlock(2 * width, 4 * width, width, downsample=True),
            LiteralBottleneckBlock(4 * width, 4 * width, width),
        )
    return nn.Sequential(
        LiteralBuildingBlock(width, width),
        LiteralBuildingBlock(width, 2 * width, downsample=True),
        LiteralBuildingBlock(2 * width, 2 * width),
    )
