"""What the sources' text says where it does not run, or runs as nobody meant: one small class for each bug."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from . import source_a, source_c


class Module(nn.Module):
    """A base class of another library between the block and `nn.Module`, with an attribute of its own."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class RenamedProjection(Module):
    """Source A's projection under its other names."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv_network = nn.Conv2d(in_channels, out_channels, 1, stride)
        self.batch_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(self.conv_network(x))


class RenamedResidualBlock(Module):
    """Source A's basic block under its other names, consistently."""

    names: ClassVar = {"conv_net_1": "conv1", "conv_net_2": "conv2", "conv_network": "conv", "batch_norm": "bn"}

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv_net_1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.conv_net_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = RenamedProjection(in_channels, out_channels, stride) if changes else nn.Identity()
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.act1(self.bn1(self.conv_net_1(x)))
        return self.act2(self.bn2(self.conv_net_2(x)) + shortcut)


class TwoSpellings(RenamedResidualBlock):
    """A4: made under one spelling, called under the other."""

    forward = source_a.ResidualBlock.forward


class MissingActivation(nn.Module):
    """A5: a class that torch does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.act2 = nn.ReLu()


class NarrowBottleneck(source_a.BottleneckResidualBlock):
    """A6: the last convolution reads the block's width and gives the bottleneck's."""

    def __init__(self, in_channels: int, bottleneck_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, bottleneck_channels, out_channels, stride)
        self.conv3 = nn.Conv2d(in_channels, bottleneck_channels, 1)
        self.bn3 = nn.BatchNorm2d(bottleneck_channels)


class Unpadded(source_c.LiteralBuildingBlock):
    """C1: 3x3 convolutions without padding."""

    def __init__(self, ch_in: int, ch_out: int, downsample: bool = False) -> None:
        super().__init__(ch_in, ch_out, downsample)
        self.conv1.padding = self.conv2.padding = (0, 0)


class ProjectsTheMainPath(source_c.LiteralBuildingBlock):
    """C3: the projection is applied to what the convolutions made."""

    def forward(self, x: Tensor) -> Tensor:
        x_res = x
        x = self.relu(self.batch(self.conv1(x)))
        x = self.batch(self.conv2(x))
        if self.downsample:
            x_res = self.batch(self.down(x))
        return self.relu(self.batch(x + x_res))


class ForgottenSelf(nn.Module):
    """C6: an attribute read as a local name."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.first_stride = stride
        self.conv1 = source_c.conv(8, 4, 1, stride=first_stride)  # noqa: F821 - the bug


def sequence_that_forgets_its_width(ch_in: int, ch_out: int) -> nn.Sequential:
    """C7: later blocks are given the first one's input channels again."""
    return nn.Sequential(
        source_c.LiteralBuildingBlock(ch_in, ch_out, downsample=True), source_c.LiteralBuildingBlock(ch_in, ch_out)
    )


class WrongSuper(nn.Module):
    """C8: another class in the call of `super`."""

    def __init__(self) -> None:
        super(source_c.ResNet, self).__init__()


def unpadded_stem() -> nn.Sequential:
    """C8: neither the convolution nor the pool pads."""
    return nn.Sequential(nn.Conv2d(3, 8, 7, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2))
