"""Fused residual blocks for PyTorch: the same numbers, faster and in less memory.

Nothing here touches a GPU or a compiler at import.
"""

from __future__ import annotations

from . import functional
from .analysis import LayerResponses, layer_responses, watch_responses
from .blocks import BasicBlock, Bottleneck, ConvBNReLU, PlainBlock, Stem
from .checking import check
from .checkpoints import Conversion, ConversionError, convert, convert_file, convert_optimizer
from .engines.cpu import release_memory
from .explain import explain
from .fold import fold, unfold
from .freeze import freeze_bn, freeze_stages, unfreeze_bn, unfreeze_stages
from .fuse import fuse, fused, unfuse
from .graphs import graphed
from .limits import disable
from .register import register_block
from .resnet import (
    cifar_resnet,
    from_stages,
    plain,
    resnet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .statistics import protected_statistics
from .tuning import TuneReport, tune, use_tuned

__version__ = "0.1.0"

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNReLU",
    "Conversion",
    "ConversionError",
    "LayerResponses",
    "PlainBlock",
    "Stem",
    "TuneReport",
    "check",
    "cifar_resnet",
    "convert",
    "convert_file",
    "convert_optimizer",
    "disable",
    "explain",
    "fold",
    "freeze_bn",
    "freeze_stages",
    "from_stages",
    "functional",
    "fuse",
    "fused",
    "graphed",
    "layer_responses",
    "plain",
    "protected_statistics",
    "register_block",
    "release_memory",
    "resnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "tune",
    "unfold",
    "unfreeze_bn",
    "unfreeze_stages",
    "unfuse",
    "use_tuned",
    "watch_responses",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
