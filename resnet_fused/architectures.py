"""The family table, and the keywords that the builders of `resnet_fused.resnet` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from typing_extensions import TypedDict

from resnet_fused.eager import BasicBlock, Bottleneck, NormLayer


class CommonOptions(TypedDict, total=False):
    """Keywords every builder takes.

    Args:
        zero_init_residual, groups, width_per_group, replace_stride_with_dilation, norm_layer: as in
            torchvision, see `resnet_fused.eager.ResNet`.
        shortcut_bn: see `resnet_fused.eager.ResNet`.
        fused: default True; False gives the stock net.
        memory: what a fused net keeps for the backward, see `fuse`; default ``"speed"``.
    """

    zero_init_residual: bool
    groups: int
    width_per_group: int
    replace_stride_with_dilation: Sequence[bool] | None
    norm_layer: NormLayer | None
    shortcut_bn: bool
    fused: bool
    memory: str


class CIFAROptions(CommonOptions, total=False):
    """`CommonOptions`, and ``bias``: give every convolution a bias."""

    bias: bool


class ResNetOptions(CIFAROptions, total=False):
    """`CIFAROptions`, and the sizes of the two ends.

    Args:
        num_classes: default 1000 for ImageNet nets, 10 for CIFAR nets; None leaves the classifier out.
        in_channels: channels of the image, default 3.
    """

    num_classes: int | None
    in_channels: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row of the family table: block, blocks in each stage, groups and width per group."""

    block: type[BasicBlock | Bottleneck]
    layers: tuple[int, ...]
    groups: int = 1
    width_per_group: int = 64


# Table 1 of He et al. 2015; ResNeXt (arXiv 1611.05431, Table 1) and Wide ResNet (arXiv 1605.07146, Table 8).
ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Architecture(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Architecture(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Architecture(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Architecture(Bottleneck, (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture(Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": Architecture(Bottleneck, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": Architecture(Bottleneck, (3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": Architecture(Bottleneck, (3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": Architecture(Bottleneck, (3, 4, 23, 3), 1, 128),
}
