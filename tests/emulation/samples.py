"""Inputs of the demonstration kernels, and the numerics law over their results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused.numerics import judge
from tests.emulation import demo_kernels

Sample = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]


def _conv_in_steps(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def _bn_relu_in_steps(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.relu(x * scale.to(x.dtype) + shift.to(x.dtype))


def _channel_sum_in_steps(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def conv_sample(npq: int = 96, c: int = 80, k: int = 48, seed: int = 0) -> Sample:
    """A bfloat16 1x1 convolution; ragged against the kernel's tiles."""
    draw = torch.Generator().manual_seed(seed)
    x, w = torch.randn(npq, c, generator=draw), torch.randn(c, k, generator=draw)
    return demo_kernels.pointwise_conv, _conv_in_steps, (x.bfloat16(), w.bfloat16())


def bn_relu_sample(npq: int = 100, c: int = 24) -> Sample:
    """A bfloat16 BN-ReLU, with a NaN and an infinity among the inputs."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(npq, c, generator=draw).bfloat16()
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    scale, shift = torch.rand(c, generator=draw) + 1, torch.rand(c, generator=draw)
    return demo_kernels.bn_relu, _bn_relu_in_steps, (x, scale, shift)


def channel_sum_sample(npq: int = 150, c: int = 40) -> Sample:
    """A per-channel sum of bfloat16 in float32."""
    x = torch.randn(npq, c, generator=torch.Generator().manual_seed(2)).bfloat16()
    return demo_kernels.channel_sum, _channel_sum_in_steps, (x,)


def lawful(sample: Sample, got: Tensor) -> bool:
    """Whether ``got`` obeys the numerics law for the sample's inputs."""
    _, in_steps, inputs = sample
    reference = in_steps(*(t.double() for t in inputs))
    return judge("result", got, reference, [in_steps(*inputs)], got.dtype).passed
