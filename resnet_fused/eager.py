"""The residual family in plain ``torch.nn``: the stock twin of what `fuse` rewrites.

Names, attribute order and arithmetic are torchvision's, so state dicts go both ways and, under one
seed, the parameters are the same to the bit. What torchvision lacks is here: the shortcut options A
(two conventions), B and C, plain nets, the stride in the first 1x1 (the paper's v1), conv biases, a
free bottleneck width and a free stem. Source: He et al. 2015, arXiv 1512.03385.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resnet_fused.eager_blocks import (
    STRIDE_INS,
    BasicBlock,
    Bottleneck,
    ConvBNReLU,
    NormLayer,
    PadShortcut,
    PlainBlock,
    Stem,
    StrideIn,
    conv1x1,
    conv3x3,
    pad_shortcut,
)

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "NormLayer",
    "PadShortcut",
    "PlainBlock",
    "ResNet",
    "Shortcut",
    "Stem",
    "StemConfig",
    "StrideIn",
    "conv1x1",
    "conv3x3",
    "pad_shortcut",
]

Shortcut = Literal["A", "A-sym", "B", "C"]

SHORTCUTS: tuple[str, ...] = ("A", "A-sym", "B", "C")


@dataclasses.dataclass(frozen=True)
class StemConfig:
    """The first layers of a `ResNet`; the default is ImageNet's, a 7x7 of stride 2, ReLU and a max pool.

    ``kernel`` is padded by half its size; ``pool`` is a 3x3 max pool of stride 2.
    """

    channels: int = 64
    kernel: int = 7
    stride: int = 2
    relu: bool = True
    pool: bool = True


class ResNet(nn.Module):
    """torchvision's ``ResNet`` with a free stem, stages and shortcuts: ``(N, C, H, W)`` to ``(N, num_classes)``.

    The first eight arguments are torchvision's, and so are the attributes (``conv1 bn1 relu maxpool
    layer1 ... avgpool fc``) and the initialisation (He, fan-out). Parts that are switched off are
    ``nn.Identity``, so every net of the family has the same forward.

    Args:
        block: `BasicBlock`, `Bottleneck`, `PlainBlock`, or a class with torchvision's constructor.
        layers: the number of blocks in each stage; any number of stages.
        num_classes: None leaves the classifier out: the output is the pooled features ``(N, K)``.
        zero_init_residual: start every block as an identity (the weight of its last batch norm is 0).
        replace_stride_with_dilation: for each stage but the first, whether to dilate instead of striding.
        in_channels: channels of the image.
        planes: width of each stage; default 64, doubling.
        out_channels: output channels of each stage (`Bottleneck` only); default ``4 * planes``.
        strides: stride of each stage; default 1, then 2.
        stem: see `StemConfig`.
        shortcut: ``"A"`` pads with zero channels at the end, ``"A-sym"`` half of them in front; ``"B"``
            projects where the shape changes, ``"C"`` everywhere. No effect on `PlainBlock`.
        shortcut_bn: whether a projection has a batch norm.
        stride_in: see `Bottleneck`; no effect on basic blocks.
        bias: give every convolution a bias.

    Raises:
        ValueError: an unknown option, a list whose length is not the number of stages, or
            ``zero_init_residual`` in a plain net, whose output would be zero.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int | None = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        in_channels: int = 3,
        planes: Sequence[int] | None = None,
        out_channels: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        stem: StemConfig = StemConfig(),
        shortcut: Shortcut = "B",
        shortcut_bn: bool = True,
        stride_in: StrideIn = "3x3",
        bias: bool = False,
    ) -> None:
        super().__init__()
        count = len(layers)
        planes = [64 * 2**i for i in range(count)] if planes is None else planes
        strides = [min(i + 1, 2) for i in range(count)] if strides is None else strides
        dilate = [False] * (count - 1) if replace_stride_with_dilation is None else replace_stride_with_dilation
        _check_stages(layers, planes, out_channels, strides, dilate)
        if out_channels is not None and not issubclass(block, Bottleneck):
            raise ValueError(f"ResNet: out_channels: expected None with {block.__name__}, got {list(out_channels)}")
        if zero_init_residual and issubclass(block, PlainBlock):
            raise ValueError("ResNet: zero_init_residual: expected False for a plain net, got True")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"ResNet: shortcut: expected one of {SHORTCUTS}, got {shortcut!r}")
        if stride_in not in STRIDE_INS:
            raise ValueError(f"ResNet: stride_in: expected one of {STRIDE_INS}, got {stride_in!r}")
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = stem.channels
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.shortcut = shortcut
        self.shortcut_bn = shortcut_bn
        self.stride_in = stride_in
        self.bias = bias
        self.conv1 = nn.Conv2d(in_channels, stem.channels, stem.kernel, stem.stride, stem.kernel // 2, bias=bias)
        self.bn1 = self._norm_layer(stem.channels)
        self.relu = nn.ReLU(inplace=True) if stem.relu else nn.Identity()
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if stem.pool else nn.Identity()
        self.stages = tuple(f"layer{i}" for i in range(1, count + 1))
        for i, name in enumerate(self.stages):
            out = None if out_channels is None else out_channels[i]
            setattr(self, name, self._make_layer(block, planes[i], layers[i], strides[i], i > 0 and dilate[i - 1], out))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Identity() if num_classes is None else nn.Linear(self.inplanes, num_classes)
        self._init_weights(zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
        out_channels: int | None = None,
    ) -> nn.Sequential:
        """One stage; its first block has the stride, or, when ``dilate``, the others the dilation."""
        options: dict[str, Any] = {"bias": True} if self.bias else {}
        if issubclass(block, Bottleneck):
            options["stride_in"] = self.stride_in
            if out_channels is not None:
                options["out_channels"] = out_channels
        out = planes * block.expansion if out_channels is None else out_channels
        dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        layers = []
        for _ in range(blocks):
            downsample = None if issubclass(block, PlainBlock) else self._downsample(out, stride)
            norm = self._norm_layer
            layers.append(
                block(
                    self.inplanes, planes, stride, downsample, self.groups, self.base_width, dilation, norm, **options
                )
            )
            self.inplanes, stride, dilation = out, 1, self.dilation
        return nn.Sequential(*layers)

    def _downsample(self, out_channels: int, stride: int) -> nn.Module | None:
        """What stands on the skip connection; None is the identity."""
        if stride == 1 and self.inplanes == out_channels and self.shortcut != "C":
            return None
        if self.shortcut in ("A", "A-sym"):
            offset = (out_channels - self.inplanes) // 2 if self.shortcut == "A-sym" else 0
            return PadShortcut(stride, offset, out_channels)
        projection = conv1x1(self.inplanes, out_channels, stride, bias=self.bias)
        return nn.Sequential(projection, *([self._norm_layer(out_channels)] if self.shortcut_bn else []))

    def _init_weights(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) and m.affine:
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        if not zero_init_residual:
            return
        for m in self.modules():
            if isinstance(m, (BasicBlock, Bottleneck)):
                last = m.bn3 if isinstance(m, Bottleneck) else m.bn2
                if isinstance(last.weight, Tensor):
                    nn.init.zeros_(last.weight)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)

        for stage in self.stages:
            x = getattr(self, stage)(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Run the stem, the stages, the global average pool and the classifier."""
        return self._forward_impl(x)


def _check_stages(
    layers: Sequence[int],
    planes: Sequence[int],
    out_channels: Sequence[int] | None,
    strides: Sequence[int],
    dilate: Sequence[bool],
) -> None:
    count = len(layers)
    if count < 1 or min(layers) < 1:
        raise ValueError(f"ResNet: layers: expected at least one stage of at least one block, got {list(layers)}")
    for name, given in (("planes", planes), ("out_channels", out_channels), ("strides", strides)):
        if given is not None and len(given) != count:
            raise ValueError(f"ResNet: {name}: expected {count} values, one for each stage, got {list(given)}")
    if len(dilate) != count - 1:
        raise ValueError(f"replace_stride_with_dilation should be None or a {count - 1}-element tuple, got {dilate}")
