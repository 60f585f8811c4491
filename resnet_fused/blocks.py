"""The blocks of the residual family as fused modules, for networks written from scratch.

Each is its stock twin in `resnet_fused.eager_blocks` (constructor, attribute names, state dict keys and
results) and runs as a chain; `unfuse` turns it into the twin. ``memory`` and ``engine`` are `fuse`'s.
A block that is not a chain, with a ``norm_layer`` that is no batch norm say, runs as its twin, and
`explain` tells why.
"""

from __future__ import annotations

from typing import Any

from . import eager_blocks
from .modules import FusedBlock, register_fused_class
from .recognise import recognise
from .spec import ChainSpec
from .structure import BINDING, Binding, structure_of


class _Native(FusedBlock):
    """Reads the chain off the modules once they are there."""

    def __init__(self, *args: Any, memory: str = "speed", engine: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        found = recognise(self)  # type: ignore[arg-type]
        if isinstance(found, ChainSpec):
            self.__dict__[BINDING] = Binding(found, memory, engine, structure_of(self, but=found.shortcut.path))  # type: ignore[arg-type]


@register_fused_class
class ConvBNReLU(_Native, eager_blocks.ConvBNReLU):
    """Convolution, batch norm, ReLU: ``(N, C, H, W)`` to ``(N, K, P, Q)``; see `eager_blocks.ConvBNReLU`.

    Equivalent to: ``F.relu(F.batch_norm(F.conv2d(x, weight, bias, stride, padding, dilation, groups), ...))``
    """

    stock_class = eager_blocks.ConvBNReLU


@register_fused_class
class BasicBlock(_Native, eager_blocks.BasicBlock):
    """Two 3x3 convolutions and a shortcut; see `eager_blocks.BasicBlock`.

    Equivalent to: ``F.relu(bn2(conv2(F.relu(bn1(conv1(x))))) + shortcut(x))``
    """

    stock_class = eager_blocks.BasicBlock


@register_fused_class
class PlainBlock(_Native, eager_blocks.PlainBlock):
    """`BasicBlock` without a shortcut; see `eager_blocks.PlainBlock`.

    Equivalent to: ``F.relu(bn2(conv2(F.relu(bn1(conv1(x))))))``
    """

    stock_class = eager_blocks.PlainBlock


@register_fused_class
class Bottleneck(_Native, eager_blocks.Bottleneck):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; see `eager_blocks.Bottleneck`.

    Equivalent to: ``F.relu(bn3(conv3(F.relu(bn2(conv2(F.relu(bn1(conv1(x)))))))) + shortcut(x))``
    """

    stock_class = eager_blocks.Bottleneck


@register_fused_class
class Stem(_Native, eager_blocks.Stem):
    """Convolution, batch norm, ReLU and max pool; see `eager_blocks.Stem`.

    Equivalent to: ``F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, weight, None, 2, 3), ...)), 3, 2, 1)``
    """

    stock_class = eager_blocks.Stem
