"""Nets with the state dicts of other code bases: their names and the order in which they register modules.

Small writings of our own; what they compute is what the originals compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import source_a, source_b


class CIFARNet(nn.Module):
    """kuangliu's names: `shortcut.0`, `linear`, a 3x3 stem without a pool."""

    def __init__(
        self, block: Callable[..., nn.Module], layers: Sequence[int], width: int = 64, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels, self.count = width, len(layers)
        for i, count in enumerate(layers):
            blocks = []
            for j in range(count):
                blocks.append(block(channels, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
                channels = width * 2**i * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.count):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PadBlock(source_b.ResidualBlock):
    """akamaster's option A: half of the zero channels stand in front, and nothing of it is in the state dict."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = nn.Sequential()
        self.stride, self.pad = stride, (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        s = self.stride
        return self.relu(out + F.pad(x[:, :, ::s, ::s], (0, 0, 0, 0, self.pad, self.pad)))


class FrozenBatchNorm(nn.Module):
    """Four buffers and no counter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, 1e-5)


class NormedConv(nn.Conv2d):
    """detectron2's convolution: its norm is a child."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__(cin, cout, kernel, stride, kernel // 2, bias=False)
        self.norm = norm(cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class DetectronBlock(nn.Module):
    """Basic without ``mid``, else a bottleneck that strides in its first 1x1."""

    def __init__(self, cin: int, cout: int, mid: int | None, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.shortcut = NormedConv(cin, cout, 1, stride, norm) if cin != cout else None
        if mid is None:
            self.conv1 = NormedConv(cin, cout, 3, stride, norm)
            self.conv2 = NormedConv(cout, cout, 3, 1, norm)
        else:
            self.conv1 = NormedConv(cin, mid, 1, stride, norm)
            self.conv2 = NormedConv(mid, mid, 3, 1, norm)
            self.conv3 = NormedConv(mid, cout, 1, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x)))
        if hasattr(self, "conv3"):
            out = self.conv3(F.relu(out))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class Detectron(nn.Module):
    """``backbone.bottom_up`` with stages ``res2`` and on."""

    def __init__(
        self,
        bottleneck: bool,
        layers: Sequence[int],
        width: int = 64,
        norm: Callable[[int], nn.Module] = FrozenBatchNorm,
    ) -> None:
        super().__init__()
        body = nn.Module()
        body.stem = nn.Module()
        body.stem.conv1 = NormedConv(3, width, 7, 2, norm)
        channels = width
        for i, count in enumerate(layers):
            mid, blocks = width * 2**i, []
            for j in range(count):
                out = 4 * mid if bottleneck else mid
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(DetectronBlock(channels, out, mid if bottleneck else None, stride, norm))
                channels = out
            body.add_module(f"res{i + 2}", nn.Sequential(*blocks))
        self.backbone = nn.Module()
        self.backbone.bottom_up = body

    def forward(self, x: Tensor) -> Tensor:
        """The last stage's feature map."""
        first, *stages = self.backbone.bottom_up.children()
        x = F.max_pool2d(F.relu(first.conv1(x)), 3, 2, 1)
        for stage in stages:
            x = stage(x)
        return x


class MMNet(nn.Module):
    """A torchvision-like trunk as ``backbone``, and mmpretrain's ``head.fc`` unless ``num_classes`` is None."""

    def __init__(self, trunk: nn.Module, channels: int = 0, num_classes: int | None = None) -> None:
        super().__init__()
        self.backbone = trunk
        if num_classes is not None:
            self.head = nn.Module()
            self.head.fc = nn.Linear(channels, num_classes)


class ConvModule(nn.Module):
    """mmcv's: children ``conv`` and ``bn``."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class MMTrunkD(nn.Module):
    """mmpretrain's ResNetV1d of bottlenecks: three convolutions in ``stem``, shortcuts that average where they
    stride; ``blocks`` are torchvision's, one stage after the other."""

    def __init__(self, stages: Sequence[nn.Sequential], channels: int = 64) -> None:
        super().__init__()
        half = channels // 2
        self.stem = nn.Sequential(ConvModule(3, half, 2), ConvModule(half, half, 1), ConvModule(half, channels, 1))
        for i, stage in enumerate(stages):
            self.add_module(f"layer{i + 1}", stage)
            down = stage[0].downsample
            if i > 0:
                down[0].stride = (1, 1)
                stage[0].downsample = nn.Sequential(nn.AvgPool2d(2, 2, 0, True, False), *down)

    def forward(self, x: Tensor) -> Tensor:
        stem, *stages = self.children()
        x = F.max_pool2d(stem(x), 3, 2, 1)
        for stage in stages:
            x = stage(x)
        return x


class OldShortcut(nn.Module):
    """labml's older names."""

    def __init__(self, new: source_a.ShortcutProjection) -> None:
        super().__init__()
        self.conv_network, self.batch_norm = new.conv, new.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(self.conv_network(x))


class OldBlock(nn.Module):
    """labml's older names, ``conv_net_1`` and so on, over a block with today's."""

    def __init__(self, new: nn.Module) -> None:
        super().__init__()
        for k in range(1, 3 + hasattr(new, "conv3")):
            self.add_module(f"conv_net_{k}", getattr(new, f"conv{k}"))
            self.add_module(f"bn{k}", getattr(new, f"bn{k}"))
        projected = isinstance(new.shortcut, source_a.ShortcutProjection)
        self.shortcut = OldShortcut(new.shortcut) if projected else nn.Identity()


def old_labml(net: source_a.ResNetBase) -> source_a.ResNetBase:
    """``net`` with its blocks under their older names."""
    net.blocks = nn.Sequential(*map(OldBlock, net.blocks))
    return net
