"""The library variant of a site: the vendor's convolution, with an engine's primitives fused around it.

Passes over a conv-output-sized tensor T beside the convolutions' own:

    forward   bn_stats R, bn_apply R + W                              (eager 4R + 2W)
    backward  bn_bwd_reduce_rebuild 2R + W, bn_bwd_apply 2R + W       (eager 6R + 2W)

``engine`` is a module with the primitives of `resnet_fused.reference`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..calls import SiteCall, SiteGrads, SiteOutputs, SiteParams, Source, handed
from ..reference import opmath


def load_source(engine: ModuleType, source: Source) -> Tensor:
    """The activation a source stands for: the plain tensor, or ``act(z + shortcut)`` materialised."""
    if source.kind == "plain" or source.moments is None:
        return source.y
    return engine.bn_apply(
        source.y,
        source.moments,
        source.residual,
        source.residual_moments,
        source.skip.stride,
        source.skip.channel_offset,
        source.relu,
    )


def require_rows(y: Tensor) -> None:
    """Raise ValueError for one value per channel in training, as ``F.batch_norm`` does."""
    if y.shape[0] * y.shape[2] * y.shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")


def eval_moments(engine: ModuleType, call: SiteCall, p: SiteParams, dtype: torch.dtype) -> Tensor:
    """Moments of running statistics for activations of ``dtype``."""
    if p.running_mean is None or p.running_var is None:
        raise ValueError("site: batch norm uses running statistics but has none")
    return engine.bn_eval_moments(p.running_mean, p.running_var, p.gamma, p.beta, p.conv_bias, call.eps, opmath(dtype))


def batch_moments(engine: ModuleType, call: SiteCall, p: SiteParams, partials: Tensor) -> Tensor:
    """Moments of a batch from its partials; moves the running buffers."""
    return engine.bn_finalize(
        partials,
        p.gamma,
        p.beta,
        p.conv_bias,
        p.running_mean,
        p.running_var,
        p.num_batches_tracked,
        call.momentum,
        call.eps,
    )


def site_moments(engine: ModuleType, call: SiteCall, y: Tensor, p: SiteParams) -> Tensor:
    """Moments of the raw output ``y``: of the batch in training, else of the running statistics."""
    if not call.training:
        return eval_moments(engine, call, p, y.dtype)
    require_rows(y)
    return batch_moments(engine, call, p, engine.bn_stats(y))


def site_conv(engine: ModuleType, call: SiteCall, x: Tensor, weight: Tensor) -> Tensor:
    """The raw convolution ``y`` ``(N, K, P, Q)`` channels_last, in the dtype of ``x``, without bias."""
    y = engine.conv_fwd(x, weight.to(x.dtype), call.stride, call.padding, call.dilation, call.groups)
    return y.contiguous(memory_format=torch.channels_last)


def site_rebuild(engine: ModuleType, call: SiteCall, source: Source, weight: Tensor) -> Tensor:
    """The raw output ``y`` of `site_forward`, made again in the same way."""
    return site_conv(engine, call, load_source(engine, source), weight)


def site_forward(engine: ModuleType, call: SiteCall, source: Source, params: SiteParams) -> SiteOutputs:
    """The raw output, its moments, and the activation that was convolved.

    Raises:
        ValueError: one value per channel in training, as ``F.batch_norm`` does.
    """
    x = load_source(engine, source)
    y = site_conv(engine, call, x, params.weight)
    return SiteOutputs(y, site_moments(engine, call, y, params), x)


def like_parameter(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad`` in the parameter's dtype and exact strides, as DDP's buckets and optimizers expect."""
    strides = weight.stride()
    if grad.dtype == weight.dtype:
        if grad.stride() == strides:
            return grad
        # the filters of a 1x1 convolution lie the same under several strides
        if weight.shape[2:] == (1, 1) and grad.stride()[:2] == strides[:2]:
            return grad.as_strided(weight.shape, strides)
    return torch.empty_like(weight).copy_(grad)


def _conv_backward(
    engine: ModuleType, call: SiteCall, dy: Tensor, x: Tensor, weight: Tensor, dx: bool, dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_x, grad_w = engine.conv_bwd(
        dy, x, weight.to(dy.dtype), call.stride, call.padding, call.dilation, call.groups, (dx, dw)
    )
    if grad_x is not None:
        grad_x = grad_x.contiguous(memory_format=torch.channels_last)
    return grad_x, None if grad_w is None else like_parameter(grad_w, weight)


def site_backward(
    engine: ModuleType,
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
        dskip: gradient of what `calls.handed` gives of ``x``, from the skip connection, or None.
        needs: whether the source's and the weight's gradients are wanted.
    """
    if not any(needs):
        return SiteGrads()
    coef = engine.bn_bwd_finalize(sums, moments, call.training)
    dy = engine.bn_bwd_apply(g, y, moments, coef, call.relu)
    if source.kind == "pending":
        return _pending_backward(engine, call, source, weight, dy, needs)
    if x is None:
        raise ValueError(f"site_backward: x: expected the stored input of a {source.kind} source, got None")
    dx, dw = _conv_backward(engine, call, dy, x, weight, *needs)
    if source.kind == "plain":
        if dx is not None and dskip is not None:
            handed(dx, call.hand_stride).add_(dskip)
        return SiteGrads(source=dx, weight=dw)
    if dx is None:
        return SiteGrads(weight=dw)
    if dskip is not None and call.hand_stride > 1:
        handed(dx, call.hand_stride).add_(dskip)
        dskip = None
    return close_backward(engine, source, x, dx, dskip)._replace(weight=dw)


def _pending_backward(
    engine: ModuleType, call: SiteCall, source: Source, weight: Tensor, dy: Tensor, needs: tuple[bool, bool]
) -> SiteGrads:
    prev, prev_moments = source.y, source.moments
    dx = sums = dw = None
    if needs[0]:
        dx, _ = _conv_backward(engine, call, dy, prev, weight, True, False)
    if needs[1]:
        if dx is None:
            act = load_source(engine, source)
        else:
            sums, act = engine.bn_bwd_reduce_rebuild(dx, prev, prev_moments, source.relu)
        _, dw = _conv_backward(engine, call, dy, act, weight, False, True)
    elif dx is not None:
        sums = engine.bn_bwd_reduce(dx, prev, prev_moments, source.relu)
    return SiteGrads(source=dx, source_sums=sums, weight=dw)


def close_backward(
    engine: ModuleType, source: Source, out: Tensor | None, dout: Tensor, dskip: Tensor | None
) -> SiteGrads:
    """Backward of a join or of a chain's end ``out = act(z + shortcut)``.

    The masked gradient is the shortcut's too, so both share one tensor.
    """
    if source.skip.kind == "none":
        if dskip is not None:
            dout = dout + dskip
        sums = engine.bn_bwd_reduce(dout, source.y, source.moments, source.relu)
        return SiteGrads(source=dout, source_sums=sums)
    projected = source.residual_moments is not None
    g, sums, residual_sums = engine.join_bwd_reduce(
        dout,
        dskip,
        out if source.relu else None,
        source.y,
        source.moments,
        source.residual if projected else None,
        source.residual_moments,
    )
    residual = residual_gradient(g, source)
    return SiteGrads(g, sums, residual, residual_sums if projected else None)


def residual_gradient(g: Tensor, source: Source) -> Tensor | None:
    """The shortcut's gradient: ``g`` itself, or for option A the kept channels at the kept positions, zero elsewhere.

    The shortcut is only needed, and only kept for backward, in option A.
    """
    if source.skip.kind == "none":
        return None
    if source.skip.kind != "pad":
        return g
    if source.residual is None:
        return None
    first, step = source.skip.channel_offset, source.skip.stride
    dx = torch.zeros_like(source.residual, memory_format=torch.channels_last)
    dx[:, :, ::step, ::step] = g[:, first : first + dx.shape[1]]
    return dx
