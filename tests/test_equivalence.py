"""Every block of the family, fused, against the same block in plain torch.nn, under the numerics law."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from resnet_fused import eager_blocks as eager
from resnet_fused import fuse

from .harness import LAYOUTS, hold_to_law, randomise, step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEMORY = ("speed", "lean", "min")


def _projection(c: int, k: int, stride: int, bias: bool = False, norm: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=bias), *([nn.BatchNorm2d(k)] if norm else []))


def _grouped(**options: object) -> nn.Module:
    return eager.Bottleneck(16, 8, groups=4, base_width=32, downsample=_projection(16, 32, 1), **options)  # type: ignore[arg-type]


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "conv-bn-relu": (lambda: eager.ConvBNReLU(6, 10, 3), 6),
    "conv-bn": (lambda: eager.ConvBNReLU(6, 10, 3, relu=False), 6),
    "conv-bn-relu-5x5-dilated": (lambda: eager.ConvBNReLU(6, 10, 5, padding=3, dilation=2, bias=True), 6),
    "conv-bn-relu-even-kernel": (lambda: eager.ConvBNReLU(6, 10, 2, stride=2, padding=1), 6),
    "sequential": (lambda: nn.Sequential(nn.Conv2d(6, 10, 3), nn.BatchNorm2d(10), nn.ReLU()), 6),
    "basic": (lambda: eager.BasicBlock(8, 8), 8),
    "basic-bias": (lambda: eager.BasicBlock(8, 8, bias=True), 8),
    "basic-projection": (lambda: eager.BasicBlock(8, 16, 2, _projection(8, 16, 2)), 8),
    "basic-projection-bias": (lambda: eager.BasicBlock(8, 16, 2, _projection(8, 16, 2, bias=True), bias=True), 8),
    "basic-projection-no-bn": (lambda: eager.BasicBlock(8, 16, 2, _projection(8, 16, 2, bias=True, norm=False)), 8),
    "basic-option-c": (lambda: eager.BasicBlock(8, 8, 1, _projection(8, 8, 1)), 8),
    "basic-pad": (lambda: eager.BasicBlock(8, 16, 2, eager.PadShortcut(2, 0, 16)), 8),
    "basic-pad-symmetric": (lambda: eager.BasicBlock(8, 16, 2, eager.PadShortcut(2, 4, 16)), 8),
    "plain": (lambda: eager.PlainBlock(8, 12, 2), 8),
    "bottleneck": (lambda: eager.Bottleneck(32, 8), 32),
    "bottleneck-bias": (lambda: eager.Bottleneck(32, 8, bias=True), 32),
    "bottleneck-projection": (lambda: eager.Bottleneck(16, 8, 2, _projection(16, 32, 2)), 16),
    "bottleneck-projection-stride-1": (lambda: eager.Bottleneck(16, 8, 1, _projection(16, 32, 1)), 16),
    "bottleneck-stride-in-1x1": (lambda: eager.Bottleneck(16, 8, 2, _projection(16, 32, 2), stride_in="1x1"), 16),
    "bottleneck-free-width": (lambda: eager.Bottleneck(24, 5, out_channels=24), 24),
    "bottleneck-pad": (lambda: eager.Bottleneck(16, 8, 2, eager.PadShortcut(2, 8, 32)), 16),
    "bottleneck-dilated": (lambda: eager.Bottleneck(32, 8, dilation=2), 32),
    "resnext": (_grouped, 16),
    "stem": (lambda: eager.Stem(3, 12), 3),
    "stem-no-pool": (lambda: eager.Stem(3, 12, 3, 1, pool=False), 3),
    "stem-bare": (lambda: eager.Stem(3, 12, 5, 2, bias=True, relu=False, pool=False), 3),
}


def _block(name: str) -> tuple[nn.Module, torch.Tensor]:
    make, channels = BLOCKS[name]
    torch.manual_seed(0)
    return randomise(make()), torch.randn(3, channels, 13, 11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, dtype: str, layout: str, device: str) -> None:
    block, x = _block(name)
    hold_to_law(block, x, DTYPES[dtype], layout=layout, device=device)


@pytest.mark.parametrize("memory", MEMORY[1:])
@pytest.mark.parametrize("name", BLOCKS)
def test_memory_mode(name: str, memory: str, device: str) -> None:
    block, x = _block(name)
    hold_to_law(block, x, torch.float32, memory=memory, device=device)


def _all_eval(block: nn.Module) -> None:
    block.eval()


def _frozen(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)


def _every_other_eval(block: nn.Module) -> None:
    for i, module in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        module.train(i % 2 == 1)


def _first_eval(block: nn.Module) -> None:
    next(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)).eval()


def _cumulative(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def _weights_frozen(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.requires_grad_(False)


def _zero_gamma(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)


STATES = {
    f.__name__.strip("_"): f
    for f in (_all_eval, _frozen, _every_other_eval, _first_eval, _cumulative, _weights_frozen, _zero_gamma)
}
FEW = ("conv-bn-relu", "basic-bias", "basic-projection", "basic-pad", "bottleneck", "bottleneck-projection", "stem")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", FEW)
def test_norm_state(name: str, memory: str, state: str, device: str) -> None:
    block, x = _block(name)
    hold_to_law(block, x, torch.float32, memory=memory, prepare=STATES[state], device=device)


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False}], ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [eager.BasicBlock, eager.Bottleneck], ids=lambda k: k.__name__)
def test_norm_options(kind: type[nn.Module], training: bool, options: dict[str, bool]) -> None:
    block = randomise(
        kind(32, 8 if kind is eager.Bottleneck else 32, norm_layer=lambda c: nn.BatchNorm2d(c, **options))
    )
    hold_to_law(block.train(training), torch.randn(2, 32, 7, 5), torch.float32)


SHAPES = {
    "batch-1": (1, 9, 7),
    "one-pixel": (4, 1, 1),
    "one-row": (2, 1, 17),
    "empty": (0, 8, 8),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    "name", ["conv-bn-relu", "basic", "basic-projection", "basic-pad", "bottleneck-projection", "stem"]
)
def test_shape(name: str, memory: str, shape: str, device: str) -> None:
    block, x = _block(name)
    n, h, w = SHAPES[shape]
    hold_to_law(block, torch.randn(n, x.shape[1], h, w), torch.float32, memory=memory, device=device)


@pytest.mark.parametrize("channels", [1, 3, 17, 66])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_off_the_vector_width(channels: int, dtype: str, device: str) -> None:
    torch.manual_seed(0)
    hold_to_law(
        randomise(eager.BasicBlock(channels, channels)), torch.randn(2, channels, 9, 7), DTYPES[dtype], device=device
    )


@pytest.mark.parametrize("name", FEW)
def test_non_contiguous_input(name: str) -> None:
    block, x = _block(name)
    wide = torch.randn(3, x.shape[1] * 2, 13, 22)
    view = wide.double()[:, ::2, :, ::2]
    ref = step(copy.deepcopy(block).double(), view.contiguous())
    got = step(fuse(copy.deepcopy(block).double()), view)
    for key in ref:
        torch.testing.assert_close(got[key], ref[key], msg=key)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FEW)
def test_non_finite_values_propagate(name: str, training: bool, value: float, device: str) -> None:
    block, x = _block(name)
    x[1, 2, 3, 4] = value
    hold_to_law(block.train(training), x, torch.float32, device=device)


@pytest.mark.parametrize("memory", MEMORY)
def test_huge_mean_and_tiny_variance(memory: str) -> None:
    torch.manual_seed(0)
    block = randomise(eager.Bottleneck(16, 8, 1, _projection(16, 32, 1)))
    hold_to_law(block, torch.randn(4, 16, 9, 9) * 1e-2 + 100.0, torch.float32, memory=memory)


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast(name: str, device: str) -> None:
    block, x = _block(name)
    hold_to_law(block, x, torch.bfloat16, autocast=True, device=device)


@pytest.mark.parametrize("memory", MEMORY[1:])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
@pytest.mark.parametrize("name", FEW)
def test_low_precision_memory_mode(name: str, autocast: bool, memory: str) -> None:
    block, x = _block(name)
    hold_to_law(block, x, torch.bfloat16, memory=memory, autocast=autocast)
