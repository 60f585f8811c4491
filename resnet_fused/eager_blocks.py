"""The blocks of the residual family in plain ``torch.nn``: the stock twin of every fused block.

Names, attribute order and arithmetic are torchvision's. `resnet_fused.eager` offers them all beside
the network built of them. Source: He et al. 2015, arXiv 1512.03385, section 3.3 and figure 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

NormLayer = Callable[..., nn.Module]
StrideIn = Literal["3x3", "1x1"]

STRIDE_INS: tuple[str, ...] = ("3x3", "1x1")


def conv3x3(
    in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, dilation: int = 1, bias: bool = False
) -> nn.Conv2d:
    """3x3 convolution that keeps the spatial size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=bias)


class ConvBNReLU(nn.Module):
    """Convolution, batch norm, ReLU: ``(N, C, H, W)`` to ``(N, K, P, Q)``.

    Args:
        padding: default None keeps the spatial size at stride 1 and odd ``kernel_size``.
        relu: False leaves the ReLU out.

    Equivalent to: ``F.relu(F.batch_norm(F.conv2d(x, weight, bias, stride, padding, dilation, groups), ...))``
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_layer: NormLayer | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.bn = (norm_layer or nn.BatchNorm2d)(out_channels)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the children in order."""
        return self.relu(self.bn(self.conv(x)))


class Stem(ConvBNReLU):
    """The first layers: convolution, batch norm, and, each if asked for, ReLU and a 3x3 max pool of stride 2.

    ``(N, C, H, W)`` to ``(N, K, H / 4, W / 4)`` by default.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        kernel_size: int = 7,
        stride: int = 2,
        padding: int | None = None,
        bias: bool = False,
        norm_layer: NormLayer | None = None,
        relu: bool = True,
        pool: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, bias=bias, norm_layer=norm_layer, relu=relu
        )
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the children in order."""
        return self.pool(self.relu(self.bn(self.conv(x))))


@torch.fx.wrap
def pad_shortcut(x: Tensor, stride: int, channel_offset: int, out_channels: int) -> Tensor:
    """Option A: every ``stride``-th row and column of ``x`` ``(N, C, H, W)``, zero channels around it.

    Raises:
        ValueError: ``channel_offset + C`` is more than ``out_channels``: `F.pad` would crop without a word.

    Equivalent to: ``F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, channel_offset, after))`` with
    ``after = out_channels - channel_offset - C``
    """
    after = out_channels - channel_offset - x.shape[1]
    if after < 0:
        raise ValueError(
            f"pad_shortcut: out_channels: expected at least {channel_offset + x.shape[1]} "
            f"(channel_offset {channel_offset} + {x.shape[1]} input channels), got {out_channels}"
        )
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, channel_offset, after))


class PadShortcut(nn.Module):
    """Option A as a module, see `pad_shortcut`: no parameters, and picklable where a lambda is not.

    Args:
        channel_offset: how many of the zero channels stand in front. The paper's text is read both as
            0 (all zeros at the end) and as half of them (a quarter of ``out_channels`` when they double).
    """

    def __init__(self, stride: int, channel_offset: int, out_channels: int) -> None:
        super().__init__()
        if stride < 1 or channel_offset < 0:
            raise ValueError(
                "PadShortcut: stride, channel_offset: expected at least 1 and at least 0, "
                f"got {stride} and {channel_offset}"
            )
        self.stride = stride
        self.channel_offset = channel_offset
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        """As `pad_shortcut`."""
        return pad_shortcut(x, self.stride, self.channel_offset, self.out_channels)

    def extra_repr(self) -> str:
        """Say the arguments."""
        return f"stride={self.stride}, channel_offset={self.channel_offset}, out_channels={self.out_channels}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: ``(N, inplanes, H, W)`` to ``(N, planes, H / stride, W / stride)``.

    Raises:
        ValueError: ``groups`` or ``base_width`` is not the default.
        NotImplementedError: ``dilation`` above 1, as in torchvision.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock only supports groups=1 and base_width=64, got groups={groups}, base_width={base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"Dilation > 1 not supported in BasicBlock, got dilation={dilation}")
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride, bias=bias)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes, bias=bias)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Run the two convolutions, then the shortcut, then the add, which is in place."""
        identity = x

        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        return self.relu(out)


class PlainBlock(BasicBlock):
    """`BasicBlock` without its shortcut: the paper's plain nets.

    Raises:
        ValueError: ``downsample`` is given; a plain block has no shortcut to put it on.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if downsample is not None:
            raise ValueError(f"PlainBlock: downsample: expected None, got {type(downsample).__name__}")
        super().__init__(inplanes, planes, stride, None, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Run the two convolutions."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions: ``(N, inplanes, H, W)`` to ``(N, out_channels, H / stride, W / stride)``.

    Args:
        planes: the width of the 3x3, times ``base_width / 64`` and ``groups``.
        stride_in: which convolution strides: the ``"3x3"`` (v1.5, as torchvision) or the first ``"1x1"``
            (v1, as the paper).
        out_channels: default None is ``4 * planes``.

    Raises:
        ValueError: unknown ``stride_in``.
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
        *,
        stride_in: StrideIn = "3x3",
        out_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if stride_in not in STRIDE_INS:
            raise ValueError(f"Bottleneck: stride_in: expected one of {STRIDE_INS}, got {stride_in!r}")
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        out_channels = planes * self.expansion if out_channels is None else out_channels
        stride1, stride2 = (1, stride) if stride_in == "3x3" else (stride, 1)
        self.conv1 = conv1x1(inplanes, width, stride1, bias=bias)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride2, groups, dilation, bias=bias)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, out_channels, bias=bias)
        self.bn3 = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Run the three convolutions, then the shortcut, then the add, which is in place."""
        identity = x

        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        return self.relu(out)
