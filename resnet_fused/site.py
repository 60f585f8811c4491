"""Forward and backward of one site, and of a chain's close, as plain functions over an engine.

This is the library variant: the convolution is the vendor's, and what is fused around it are the
batch norm, ReLU and add. Passes over a conv-output-sized tensor T beside the convolutions' own:

    forward   bn_stats R, bn_apply R + W                              (eager 4R + 2W)
    backward  bn_bwd_reduce_rebuild 2R + W, bn_bwd_apply 2R + W       (eager 6R + 2W)

Nothing here knows autograd or modules: the nodes of `resnet_fused.nodes` call these functions, in the
forward, in the backward, and to rebuild what a memory mode did not keep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import engines
from .reference import opmath

Pair = tuple[int, int]


class SiteCall(NamedTuple):
    """What is static about one call of a site."""

    engine: str
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    relu: bool
    training: bool  # batch statistics; False: running statistics (eval or frozen)
    momentum: float | None
    eps: float


class SiteParams(NamedTuple):
    """The tensors of a site: the convolution's, then the batch norm's. Names are torch's."""

    weight: Tensor
    conv_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


class Skip(NamedTuple):
    """Static description of what a close adds: "none", "identity", "pad" or "projection"."""

    kind: str = "none"
    stride: int = 1
    channel_offset: int = 0


class Source(NamedTuple):
    """Where a site's input comes from.

    plain: ``y`` is the input tensor itself. pending: a raw convolution output and its moments; the
    consumer applies affine and ReLU. join: pending, plus the shortcut to add before the ReLU.
    """

    kind: str
    y: Tensor
    moments: Tensor | None = None
    relu: bool = True
    skip: Skip = Skip()
    residual: Tensor | None = None
    residual_moments: Tensor | None = None


def load_source(engine: str, source: Source) -> Tensor:
    """The activation a source stands for: the plain tensor, or ``act(z + shortcut)`` materialised."""
    if source.kind == "plain" or source.moments is None:
        return source.y
    return engines.get(engine).bn_apply(
        source.y,
        source.moments,
        source.residual,
        source.residual_moments,
        source.skip.stride,
        source.skip.channel_offset,
        source.relu,
    )


def _moments(call: SiteCall, y: Tensor, p: SiteParams) -> Tensor:
    engine = engines.get(call.engine)
    if not call.training:
        if p.running_mean is None or p.running_var is None:
            raise ValueError("site: batch norm uses running statistics but has none")
        return engine.bn_eval_moments(
            p.running_mean, p.running_var, p.gamma, p.beta, p.conv_bias, call.eps, opmath(y.dtype)
        )
    if y.shape[0] * y.shape[2] * y.shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
    return engine.bn_finalize(
        engine.bn_stats(y),
        p.gamma,
        p.beta,
        p.conv_bias,
        p.running_mean,
        p.running_var,
        p.num_batches_tracked,
        call.momentum,
        call.eps,
    )


def site_conv(call: SiteCall, x: Tensor, weight: Tensor) -> Tensor:
    """The raw convolution ``y`` ``(N, K, P, Q)`` channels_last, in the dtype of ``x``, without bias."""
    y = engines.get(call.engine).conv_fwd(x, weight.to(x.dtype), call.stride, call.padding, call.dilation, call.groups)
    return y.contiguous(memory_format=torch.channels_last)


def site_forward(call: SiteCall, source: Source, params: SiteParams) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, moments, x)``: the raw output, its moments, and the activation that was convolved.

    Raises:
        ValueError: one value per channel in training, as ``F.batch_norm`` does.
    """
    x = load_source(call.engine, source)
    y = site_conv(call, x, params.weight)
    return y, _moments(call, y, params), x


class SiteGrads(NamedTuple):
    """Gradients of a site's inputs; ``source`` and ``residual`` are those of the tensors in `Source`."""

    source: Tensor | None = None
    source_sums: Tensor | None = None
    residual: Tensor | None = None
    residual_sums: Tensor | None = None
    weight: Tensor | None = None


def _like_parameter(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad`` in the parameter's dtype and exact strides, as DDP's buckets and optimizers expect."""
    if grad.dtype == weight.dtype and grad.stride() == weight.stride():
        return grad
    return torch.empty_like(weight).copy_(grad)


def _conv_backward(
    call: SiteCall, dy: Tensor, x: Tensor, weight: Tensor, dx: bool, dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_x, grad_w = engines.get(call.engine).conv_bwd(
        dy, x, weight.to(dy.dtype), call.stride, call.padding, call.dilation, call.groups, (dx, dw)
    )
    if grad_x is not None:
        grad_x = grad_x.contiguous(memory_format=torch.channels_last)
    return grad_x, None if grad_w is None else _like_parameter(grad_w, weight)


def site_backward(
    call: SiteCall,
    source: Source,
    x: Tensor | None,
    weight: Tensor,
    y: Tensor,
    moments: Tensor,
    g: Tensor,
    sums: Tensor,
    dskip: Tensor | None,
    needs: tuple[bool, bool],
) -> SiteGrads:
    """Backward of `site_forward`.

    Args:
        x: the activation that was convolved, when it was kept (plain and join); None for pending.
        g: gradient of ``z``, or of ``act(z)``: the site's own ReLU mask is applied here (masking
            twice changes nothing). sums: ``(2, K)`` its reductions, made by the consumer.
        dskip: gradient of ``x`` from the skip connection, or None.
        needs: whether the source's and the weight's gradients are wanted.
    """
    if not any(needs):
        return SiteGrads()
    engine = engines.get(call.engine)
    coef = engine.bn_bwd_finalize(sums, moments, call.training)
    dy = engine.bn_bwd_apply(g, y, moments, coef, call.relu)
    if source.kind == "pending":
        return _pending_backward(call, source, weight, dy, needs)
    if x is None:
        raise ValueError(f"site_backward: x: expected the stored input of a {source.kind} source, got None")
    dx, dw = _conv_backward(call, dy, x, weight, *needs)
    if source.kind == "plain":
        if dx is not None and dskip is not None:
            dx = dx.add_(dskip)
        return SiteGrads(source=dx, weight=dw)
    if dx is None:
        return SiteGrads(weight=dw)
    return close_backward(call.engine, source, x, dx, dskip)._replace(weight=dw)


def _pending_backward(
    call: SiteCall, source: Source, weight: Tensor, dy: Tensor, needs: tuple[bool, bool]
) -> SiteGrads:
    engine = engines.get(call.engine)
    prev, prev_moments = source.y, source.moments
    dx = sums = dw = None
    if needs[0]:
        dx, _ = _conv_backward(call, dy, prev, weight, True, False)
    if needs[1]:
        if dx is None:
            act = load_source(call.engine, source)
        else:
            sums, act = engine.bn_bwd_reduce_rebuild(dx, prev, prev_moments, source.relu)
        _, dw = _conv_backward(call, dy, act, weight, False, True)
    elif dx is not None:
        sums = engine.bn_bwd_reduce(dx, prev, prev_moments, source.relu)
    return SiteGrads(source=dx, source_sums=sums, weight=dw)


def close_backward(engine: str, source: Source, out: Tensor, dout: Tensor, dskip: Tensor | None) -> SiteGrads:
    """Backward of a join or of a chain's end ``out = act(z + shortcut)``.

    The masked gradient is the shortcut's too, so both share one tensor.
    """
    primitives = engines.get(engine)
    if source.skip.kind == "none":
        if dskip is not None:
            dout = dout + dskip
        sums = primitives.bn_bwd_reduce(dout, source.y, source.moments, source.relu)
        return SiteGrads(source=dout, source_sums=sums)
    projected = source.residual_moments is not None
    g, sums, residual_sums = primitives.join_bwd_reduce(
        dout,
        dskip,
        out if source.relu else None,
        source.y,
        source.moments,
        source.residual if projected else None,
        source.residual_moments,
    )
    residual = _pad_backward(g, source) if source.skip.kind == "pad" else g
    return SiteGrads(g, sums, residual, residual_sums if projected else None)


def _pad_backward(g: Tensor, source: Source) -> Tensor | None:
    """Gradient of an option A shortcut: the kept channels, at the kept positions, zero elsewhere."""
    if source.residual is None:
        return None
    first, step = source.skip.channel_offset, source.skip.stride
    dx = torch.zeros_like(source.residual, memory_format=torch.channels_last)
    dx[:, :, ::step, ::step] = g[:, first : first + dx.shape[1]]
    return dx
