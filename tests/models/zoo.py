"""Small instances of every architecture, each with an input shape, for tests that run over all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from resnet_fused.eager import BasicBlock, Bottleneck, ConvBNReLU, ResNet, Stem, StemConfig
from resnet_fused.resnet import cifar_resnet, from_stages

from . import source_a, source_b, source_c, source_d

Shape = tuple[int, int, int, int]

SMALL = StemConfig(channels=8)
basic = functools.partial(ResNet, BasicBlock, (1, 1, 1, 1), 10, planes=(8, 16, 16, 24), stem=SMALL)
bottleneck = functools.partial(ResNet, Bottleneck, (2, 1), 10, planes=(8, 16), stem=SMALL)


def source_a_in_sequential() -> nn.Sequential:
    """How source A's users add a classifier to the headless net."""
    return nn.Sequential(source_a.ResNetBase([2, 1], [8, 16], [8, 8], first_kernel_size=3), nn.Linear(16, 10))


def source_c_fixed(use_bottleneck: bool) -> nn.Module:
    return source_c.ResNet((1, 2), use_bottleneck, num_classes=10, channels=(8, 16))


def source_d_whole(type2: bool) -> nn.Sequential:
    block = source_d.ResidualBlockType2 if type2 else source_d.ResidualBlockType1
    return source_d.whole(source_d.stages(block, (1, 2), 8), 8, 16 * block.expansion, num_classes=10)


ZOO: list[tuple[str, Callable[[], nn.Module], Shape]] = [
    ("a-basic-labml", lambda: source_a.ResNetBase([2, 1], [8, 16], first_kernel_size=3), (2, 3, 17, 16)),
    (
        "a-basic-paper",
        lambda: source_a.ResNetBase([2, 1], [8, 16], first_kernel_size=3, stride_rule="paper"),
        (2, 3, 16, 16),
    ),
    ("a-bottleneck-labml", lambda: source_a.ResNetBase([1, 2], [8, 24], [8, 16]), (2, 3, 16, 16)),
    ("a-in-sequential", source_a_in_sequential, (2, 3, 16, 16)),
    ("b-basic", lambda: source_b.ResNet(source_b.ResidualBlock, (2, 1, 1, 1), width=8), (2, 3, 16, 16)),
    (
        "b-bottleneck-headed",
        lambda: source_b.ResNet(source_b.BottleneckBlock, (2, 1, 1, 1), num_classes=10, width=8),
        (2, 3, 16, 15),
    ),
    (
        "b-zero-init",
        lambda: source_b.ResNet(source_b.ResidualBlock, (1, 1, 1, 1), zero_init_residual=True, width=8),
        (2, 3, 16, 16),
    ),
    ("c-basic", lambda: source_c_fixed(False), (2, 3, 32, 32)),
    ("c-bottleneck", lambda: source_c_fixed(True), (2, 3, 32, 32)),
    ("c-literal-basic", lambda: source_c.literal_net(bottleneck=False), (2, 8, 12, 12)),
    ("c-literal-bottleneck", lambda: source_c.literal_net(bottleneck=True), (2, 16, 12, 12)),
    ("d-type1", lambda: source_d_whole(type2=False), (2, 3, 32, 32)),
    ("d-type2", lambda: source_d_whole(type2=True), (2, 3, 32, 32)),
    ("basic", basic, (2, 3, 64, 64)),
    ("basic-zero-init", functools.partial(basic, zero_init_residual=True), (2, 3, 64, 64)),
    ("bottleneck-v1.5", bottleneck, (2, 3, 32, 32)),
    ("bottleneck-v1", functools.partial(bottleneck, stride_in="1x1"), (2, 3, 33, 31)),
    ("bottleneck-C", functools.partial(bottleneck, shortcut="C"), (2, 3, 32, 32)),
    ("bottleneck-A-sym", functools.partial(bottleneck, shortcut="A-sym"), (2, 3, 32, 32)),
    ("bottleneck-B-no-bn-bias", functools.partial(bottleneck, shortcut_bn=False, bias=True), (2, 3, 32, 32)),
    ("bottleneck-groups", functools.partial(bottleneck, groups=4, width_per_group=16), (2, 3, 32, 32)),
    (
        "bottleneck-dilated",
        functools.partial(bottleneck, replace_stride_with_dilation=[True]),
        (2, 3, 32, 32),
    ),
    ("cifar-8-A", lambda: cifar_resnet(8, "A", fused=False), (2, 3, 17, 16)),
    ("cifar-8-A-sym", lambda: cifar_resnet(8, "A-sym", fused=False), (2, 3, 16, 16)),
    ("cifar-8-B", lambda: cifar_resnet(8, "B", fused=False), (2, 3, 16, 16)),
    ("cifar-8-C", lambda: cifar_resnet(8, "C", fused=False), (2, 3, 16, 16)),
    ("plain-8", lambda: cifar_resnet(8, None, fused=False), (2, 3, 16, 16)),
    (
        "from-stages-stem-relu-pool",
        lambda: from_stages([1, 1], [8, 16], stem_relu=True, stem_pool=True, fused=False),
        (2, 3, 32, 32),
    ),
    ("from-stages-headless", lambda: from_stages([1, 1], [8, 24], [8, 8], stem_kernel=3, fused=False), (2, 3, 16, 16)),
    ("conv-bn-relu", lambda: nn.Sequential(ConvBNReLU(3, 8, 3), ConvBNReLU(8, 8, 1, relu=False)), (2, 3, 8, 8)),
    ("stem", lambda: nn.Sequential(Stem(3, 8), nn.Flatten()), (2, 3, 16, 16)),
]
"""``(name, factory, input shape)``: the factory draws its parameters from torch's seed."""
