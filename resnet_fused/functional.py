"""The chain's pieces as functions, for networks that are not made of modules.

They run on the same nodes and engines as fused blocks: one site and its end, or the end alone. Output and gradients are
the stock expression's up to rounding; double backward raises an error.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from . import engines
from .calls import NO_SKIP, SiteCall, SiteParams, Skip
from .chain import close
from .nodes import NodeCall, Pending, SiteFunction
from .running import compute_dtype, is_channels_last

IntPair = int | tuple[int, int]


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution, batch norm, an optional residual add, and ReLU.

    Args:
        input: ``(N, C, H, W)``, floating point, any memory format.
        weight: ``(K, C / groups, R, S)``.
        gamma, beta: ``(K,)``, batch norm's affine; None is 1 and 0.
        running_mean, running_var: ``(K,)``, float32 as a rule; moved in place when ``training``, read when not.
        bias: ``(K,)``, the convolution's.
        training: use the batch's statistics, as ``F.batch_norm``'s argument.
        residual: ``(N, K, P, Q)``, added before the ReLU.

    Returns:
        ``(N, K, P, Q)``, in channels_last if ``input`` or ``weight`` is, else contiguous.

    Raises:
        TypeError: ``input`` or ``weight`` is not a floating-point tensor.
        ValueError: shapes that do not fit; no running statistics when not ``training``; one value per channel.

    Equivalent to: ``F.relu(F.batch_norm(F.conv2d(input, weight, bias, stride, padding, dilation, groups),
    running_mean, running_var, gamma, beta, training, momentum, eps) + residual)``
    """
    _check_images("conv_bn_relu", "input", input)
    _check_images("conv_bn_relu", "weight", weight)
    if input.shape[1] != weight.shape[1] * groups:
        _refuse("conv_bn_relu", "input", f"{weight.shape[1] * groups} channels (weight's times groups)", input.shape[1])
    vectors = {"gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var, "bias": bias}
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != (weight.shape[0],):
            _refuse("conv_bn_relu", name, f"shape ({weight.shape[0]},)", tuple(vector.shape))
    if (running_mean is None) != (running_var is None):
        _refuse("conv_bn_relu", "running_mean, running_var", "both or neither", "one of them")
    if not training and running_mean is None:
        _refuse("conv_bn_relu", "running_mean", "running statistics when training is False", None)
    dtype = compute_dtype(input)
    engine = engines.select(input.device, dtype)
    directly = relu and residual is None  # after an add the mask is the sum's, and the chain's end applies it
    call = SiteCall(engine, _pair(stride), _pair(padding), _pair(dilation), groups, directly, training, momentum, eps)
    params = SiteParams(weight, bias, gamma, beta, running_mean, running_var, None)
    x = input.to(dtype, memory_format=torch.channels_last)
    node = NodeCall("plain", True, NO_SKIP, (call,), hands=False)
    y, moments, carrier = SiteFunction.apply(node, x, None, None, None, None, None, *params)
    skip = NO_SKIP
    if residual is not None:
        if residual.shape != y.shape:
            _refuse("conv_bn_relu", "residual", f"shape {tuple(y.shape)}", tuple(residual.shape))
        residual, skip = residual.contiguous(memory_format=torch.channels_last), Skip("identity")
    out = close(Pending(y, moments, carrier, relu, skip, residual), engine, promote=True)
    return _laid_like(out, input, weight)


def add_relu(input: Tensor, other: Tensor) -> Tensor:
    """Add and ReLU in one pass each way; what is kept for the backward is the result alone.

    Args:
        input, other: ``(N, C, H, W)``, floating point, of one shape; their dtypes promote.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: not of one shape with four dimensions.

    Equivalent to: ``F.relu(input + other)``
    """
    _check_images("add_relu", "input", input)
    _check_images("add_relu", "other", other)
    if input.shape != other.shape:
        _refuse("add_relu", "other", f"shape {tuple(input.shape)}", tuple(other.shape))
    dtype = torch.promote_types(input.dtype, other.dtype)
    a, b = (t.to(dtype, memory_format=torch.channels_last) for t in (input, other))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    zero, one = (value(a.shape[1], device=a.device, dtype=statistics) for value in (torch.zeros, torch.ones))
    moments = torch.stack([zero, one, one, zero, zero])
    pending = Pending(a, moments, moments[:2], True, Skip("identity"), b)
    return _laid_like(close(pending, engines.select(a.device, dtype)), input, other)


def _laid_like(out: Tensor, *inputs: Tensor) -> Tensor:
    return out if any(is_channels_last(t) for t in inputs) else out.contiguous()


def _pair(value: IntPair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check_images(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name}: expected a floating-point tensor, got {got}")
    if value.dim() != 4:
        _refuse(op, name, "four dimensions", tuple(value.shape))


def _refuse(op: str, name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {name}: expected {expected}, got {got}")
