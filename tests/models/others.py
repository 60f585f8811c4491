"""Blocks and nets in the manner of libraries that are not installed everywhere: small, and with their structure.

mmcv: norms looked up by name, a checkpointing branch, frozen stages. detectron2: a convolution that runs its own norm
and activation, stages by ``add_module``. kuangliu and akamaster: the CIFAR nets, whose stems are functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MMBasicBlock(nn.Module):
    """mmcv's: batch norms named after their number and reached by properties."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, with_cp: bool = False) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.add_module(self.norm1_name, nn.BatchNorm2d(channels))
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.add_module(self.norm2_name, nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.downsample = nn.Sequential(pool, conv, nn.BatchNorm2d(channels))
        self.with_cp = with_cp

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            identity = x
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.norm2(self.conv2(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        out = checkpoint(inner, x, use_reentrant=False) if self.with_cp and x.requires_grad else inner(x)
        return self.relu(out)


class MMResLayer(nn.Sequential):
    """A stage, as a class of its own."""


class MMResNet(nn.Module):
    """mmcv's backbone: several outputs, frozen stages, batch norms kept in eval mode."""

    def __init__(self, frozen_stages: int = -1, norm_eval: bool = False, with_cp: bool = False) -> None:
        super().__init__()
        self.frozen_stages, self.norm_eval, self.out_indices = frozen_stages, norm_eval, (0, 1)
        self.norm1_name = "bn1"
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.add_module(self.norm1_name, nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.res_layers = []
        for i, (planes, width) in enumerate(((8, 8), (8, 16))):
            stage = MMResLayer(MMBasicBlock(planes, width, i + 1, with_cp), MMBasicBlock(width, width, 1, with_cp))
            self.add_module(f"layer{i + 1}", stage)
            self.res_layers.append(f"layer{i + 1}")
        self.train()

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.maxpool(self.relu(self.norm1(self.conv1(x))))
        outs = []
        for i, name in enumerate(self.res_layers):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outs.append(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> MMResNet:
        super().train(mode)
        if self.frozen_stages >= 0:
            self.norm1.eval()
            for module in (
                self.conv1,
                self.norm1,
                *(getattr(self, f"layer{i + 1}") for i in range(self.frozen_stages)),
            ):
                module.eval()
                module.requires_grad_(False)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


class D2Conv2d(nn.Conv2d):
    """detectron2's: norm and activation are attributes, and run in the convolution's own forward."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, bias=False, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings(record=True):
            if x.numel() == 0 and self.training:
                assert not isinstance(self.norm, nn.SyncBatchNorm), "SyncBatchNorm does not support empty inputs!"
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


Norm = Callable[[int], nn.Module]


class D2BottleneckBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        width = out_channels // 2
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = D2Conv2d(in_channels, out_channels, 1, stride, norm=norm(out_channels))
        self.conv1 = D2Conv2d(in_channels, width, 1, stride, norm=norm(width))
        self.conv2 = D2Conv2d(width, width, 3, padding=1, norm=norm(width), activation=F.relu_)
        self.conv3 = D2Conv2d(width, out_channels, 1, norm=norm(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = self.conv3(self.conv2(out))
        shortcut = self.shortcut(x) if self.shortcut is not None else x
        out += shortcut
        return F.relu_(out)


class D2Stem(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.conv1 = D2Conv2d(3, 8, 7, stride=2, padding=3, norm=norm(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class D2ResNet(nn.Module):
    """detectron2's backbone: a dict of named feature maps."""

    def __init__(self, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = D2Stem(norm)
        self.stage_names, self.stages = ("res2", "res3"), []
        for name, channels, stride in (("res2", (8, 16), 1), ("res3", (16, 24), 2)):
            blocks = [D2BottleneckBlock(*channels, stride, norm), D2BottleneckBlock(channels[1], channels[1], 1, norm)]
            stage = nn.Sequential(*blocks)
            self.add_module(name, stage)
            self.stages.append(stage)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        assert x.dim() == 4, f"ResNet takes an input of shape (N, C, H, W). Got {x.shape} instead!"
        outputs = {}
        x = self.stem(x)
        for name, stage in zip(self.stage_names, self.stages, strict=True):
            x = stage(x)
            outputs[name] = x
        return outputs


class LambdaLayer(nn.Module):
    def __init__(self, lambd: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lambd = lambd

    def forward(self, x: Tensor) -> Tensor:
        return self.lambd(x)


class CifarBlock(nn.Module):
    """kuangliu's with option B, akamaster's with option A."""

    def __init__(self, in_planes: int, planes: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_planes != planes:
            if option == "A":
                front = (planes - in_planes) // 2
                self.shortcut = LambdaLayer(
                    lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, front, front), "constant", 0)
                )
            else:
                conv = nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    def __init__(self, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(CifarBlock(8, 8, 1, option), CifarBlock(8, 8, 1, option))
        self.layer2 = nn.Sequential(CifarBlock(8, 16, 2, option), CifarBlock(16, 16, 1, option))
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer2(self.layer1(out))
        out = F.avg_pool2d(out, int(out.size()[3]))
        return self.linear(out.view(out.size(0), -1))


def first(out: Any) -> Tensor:
    """One tensor of whatever a net returns, in which every output has a part."""
    if isinstance(out, Tensor):
        return out
    parts = list(out.values()) if isinstance(out, dict) else list(out)
    return torch.cat([part.mean((2, 3)) if part.dim() == 4 else part for part in parts], 1)


class One(nn.Module):
    """A net that returns several tensors, as one that returns one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return first(self.net(x))
