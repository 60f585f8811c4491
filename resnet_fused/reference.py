"""The specification: every primitive of the chain in plain PyTorch.

Each function is what an engine must compute, and runs in any float dtype (float64 for tests).
Activations are ``(N, C, H, W)``; per-channel values are at least float32 ("opmath").

    site        y = conv(x, w)        z = scale * (y - mean) + shift        act = relu(z)
    moments     (5, C): mean, rstd, scale = gamma * rstd, shift = beta, 1 / count
    partials    (T, 3, C): count, mean, M2 of T disjoint sets of rows; merged by Chan's formula
    sums        (2, C): sum g, sum g * xhat, with xhat = (y - mean) * rstd and g the gradient of z
    coef        (3, C): dy = a * g + b * (y - mean) + c; (1, C), a alone, with running statistics

``z`` is always evaluated as written, never with a folded shift: folding loses digits when the mean
is much larger than the deviation. ReLU lets a NaN through, and its mask is ``z <= 0``, false for a
NaN, so the gradient passes there too. Variance is never E[y^2] - E[y]^2. Statistics are those of
``y`` as stored. Source: Ioffe & Szegedy 2015, section 3; Chan, Golub & LeVeque 1979.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and affines of ``dtype`` activations are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


def _affine(y: Tensor, moments: Tensor) -> Tensor:
    mean, _, scale, shift, _ = moments
    return _per_channel(scale) * (y.to(moments.dtype) - _per_channel(mean)) + _per_channel(shift)


def _xhat(y: Tensor, moments: Tensor) -> Tensor:
    return (y.to(moments.dtype) - _per_channel(moments[0])) * _per_channel(moments[1])


def _sums(g: Tensor, y: Tensor, moments: Tensor) -> Tensor:
    return torch.stack([g.sum((0, 2, 3)), (g * _xhat(y, moments)).sum((0, 2, 3))])


def conv_fwd(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """The raw convolution ``y``, without bias: a bias lives in the moments (see `bn_finalize`).

    Args:
        x: ``(N, C, H, W)``.  weight: ``(K, C / groups, R, S)``, dtype of ``x``.

    Equivalent to: ``F.conv2d(x, weight, None, stride, padding, dilation, groups)``
    """
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def conv_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int, mask: Pair
) -> tuple[Tensor | None, Tensor | None]:
    """``(dx, dweight)`` of `conv_fwd`; ``mask`` says which of them to compute, the other is None.

    Only the shape of ``x`` is used for ``dx``, only that of ``weight`` for ``dweight``.

    Equivalent to: ``torch.nn.grad.conv2d_input`` and ``torch.nn.grad.conv2d_weight``
    """
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (bool(mask[0]), bool(mask[1]), False)
    )
    return dx, dweight


def bn_stats(y: Tensor) -> Tensor:
    """Partial statistics ``(T, 3, C)`` of ``y`` ``(N, C, H, W)`` over its ``N * H * W`` rows; here T = 1.

    Equivalent to: ``torch.var_mean(y, (0, 2, 3), unbiased=False)`` with M2 = var * count
    """
    rows = y.numel() // y.shape[1]
    y = y.to(opmath(y.dtype))
    mean = y.mean((0, 2, 3)) if rows else y.new_zeros(y.shape[1])
    m2 = (y - _per_channel(mean)).square().sum((0, 2, 3))
    return torch.stack([torch.full_like(mean, rows), mean, m2])[None]


def merge_partials(partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``(T, 3, C)`` partials in order by Chan's formula into ``(count, mean, M2)``, each ``(C,)``.

    An infinite mean stays infinite beside finite ones, as in a sum.
    """
    count, mean, m2 = partials[0]
    for n, m, s in partials[1:]:
        total = count + n
        share = torch.where(total > 0, n / total.clamp(min=1), 0.0)
        delta = m - mean
        mean = torch.where(delta.isfinite(), mean + delta * share, mean + m)
        m2 = m2 + s + delta.square() * count * share
        count = total
    return count, mean, m2


def _moments(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, inv: Tensor) -> Tensor:
    rstd = (var + eps).rsqrt()
    scale = rstd if weight is None else weight.to(rstd.dtype) * rstd
    shift = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
    return torch.stack([mean, rstd, scale, shift, inv.expand_as(rstd)])


def bn_finalize(
    partials: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Moments ``(5, C)`` of a batch, from its partials; moves the running buffers, in place.

    A convolution bias in front of a batch norm in training cancels out of the output: it only
    shifts ``running_mean``, so the convolution runs without it and it is added here.
    ``momentum=None`` is the cumulative average: the factor 1 / ``num_batches_tracked`` is
    taken on the device. An empty batch moves only the counter.

    Equivalent to: ``F.batch_norm(y, running_mean, running_var, weight, bias, True, momentum, eps)``
    """
    count, mean, m2 = merge_partials(partials)
    inv = 1 / count.clamp(min=1)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is not None and running_var is not None:
        if momentum is None:
            tracked = torch.zeros_like(count[0]) if num_batches_tracked is None else num_batches_tracked
            factor = 1 / tracked.to(mean.dtype)
        else:
            factor = torch.full_like(count[0], momentum)
        factor = torch.where(count > 0, factor, 0.0)
        batch_mean = mean if conv_bias is None else mean + conv_bias.to(mean.dtype)
        unbiased = m2 / (count - 1).clamp(min=1)
        for buffer, value in ((running_mean, batch_mean), (running_var, unbiased)):
            buffer.copy_((1 - factor) * buffer.to(mean.dtype) + factor * value)
    return _moments(mean, m2 * inv, weight, bias, eps, inv)


def bn_eval_moments(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Moments ``(5, C)`` of running statistics, for eval mode and frozen batch norm; 1 / count is 0.

    The convolution's bias is taken off the mean, so the bias-free convolution gives the same output.

    Equivalent to: ``F.batch_norm(y + conv_bias, running_mean, running_var, weight, bias, False, 0.0, eps)``
    """
    mean = running_mean.to(dtype)
    if conv_bias is not None:
        mean = mean - conv_bias.to(dtype)
    return _moments(mean, running_var.to(dtype), weight, bias, eps, mean.new_zeros(()))


def pad_residual(residual: Tensor, channels: int, stride: int, channel_offset: int) -> Tensor:
    """Option A: subsample by ``stride`` and zero-pad to ``channels``, ``channel_offset`` of the zeros in front."""
    residual = residual[:, :, ::stride, ::stride]
    after = channels - residual.shape[1] - channel_offset
    return F.pad(residual, (0, 0, 0, 0, channel_offset, after))


def bn_apply(
    y: Tensor,
    moments: Tensor,
    residual: Tensor | None,
    residual_moments: Tensor | None,
    residual_stride: int,
    channel_offset: int,
    relu: bool,
) -> Tensor:
    """``act(z + shortcut)`` in the dtype of ``y``.

    With a shortcut, ``z`` (and a projection's own ``z``) is rounded to the dtype before the add, as the
    stock modules do by storing it: the sign near zero, and so the backward's mask, is then theirs.

    Args:
        residual: None, or the shortcut: ``(N, C, P, Q)``; with ``residual_moments`` it is a
            projection's raw output and its own affine is applied; with ``residual_stride > 1`` or
            fewer channels than ``y`` it is an option A shortcut, subsampled and zero-padded.

    Equivalent to: ``F.relu(F.batch_norm(y, ...) + shortcut)``
    """
    z = _affine(y, moments)
    if residual is not None:
        if residual_moments is not None:
            residual = _affine(residual, residual_moments).to(residual.dtype)
        elif residual.shape != y.shape:
            residual = pad_residual(residual, y.shape[1], residual_stride, channel_offset)
        z = z.to(y.dtype).to(z.dtype) + residual.to(z.dtype)
    return (torch.where(z <= 0, 0.0, z) if relu else z).to(y.dtype)


def bn_bwd_reduce(dout: Tensor, y: Tensor, moments: Tensor, relu: bool) -> Tensor:
    """``sums`` ``(2, C)`` of the gradient ``dout`` of ``act(z)``, masked by ``z <= 0`` when ``relu``."""
    g = dout.to(moments.dtype)
    if relu:
        g = torch.where(_affine(y, moments) <= 0, 0.0, g)
    return _sums(g, y, moments)


def bn_bwd_reduce_rebuild(dout: Tensor, y: Tensor, moments: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """`bn_bwd_reduce`, and in the same pass ``act(z)`` as the forward stored it: ``(sums, act)``."""
    return bn_bwd_reduce(dout, y, moments, relu), bn_apply(y, moments, None, None, 1, 0, relu)


def join_bwd_reduce(
    dout: Tensor,
    dskip: Tensor | None,
    out: Tensor | None,
    y: Tensor,
    moments: Tensor,
    residual_y: Tensor | None,
    residual_moments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of ``out = act(z + shortcut)``: ``(g, sums, residual_sums)``.

    Args:
        dskip: a second gradient of ``out`` to add (the skip connection's), or None.
        out: the stored output, whose sign is the mask; None when there is no ReLU.
        residual_y, residual_moments: a projection's raw output and moments, or None.

    ``g`` ``(N, C, P, Q)`` is the masked gradient, of ``z`` and of the shortcut alike.
    ``residual_sums`` is ``(2, C)`` for a projection, else ``(0,)``.
    """
    g = dout.to(moments.dtype)
    if dskip is not None:
        g = g + dskip.to(moments.dtype)
    if out is not None:
        g = torch.where(out <= 0, 0.0, g)
    g = g.to(y.dtype)
    wide = g.to(moments.dtype)
    residual_sums = moments.new_empty(0)
    if residual_y is not None and residual_moments is not None:
        residual_sums = _sums(wide, residual_y, residual_moments)
    return g, _sums(wide, y, moments), residual_sums


def bn_bwd_finalize(sums: Tensor, moments: Tensor, training: bool) -> Tensor:
    """Coefficients of ``dy``: ``(3, C)`` of batch statistics, ``(1, C)`` of running statistics."""
    _, rstd, scale, _, inv = moments
    if not training:
        return scale[None].clone()
    return torch.stack([scale, -scale * rstd * sums[1] * inv, -scale * sums[0] * inv])


def bn_bwd_apply(g: Tensor, y: Tensor, moments: Tensor, coef: Tensor, relu: bool) -> Tensor:
    """``dy`` in the dtype of ``y``; ``g`` is masked by ``z <= 0`` first when ``relu``.

    With running statistics ``y`` has no part in ``dy``, so that an Inf in it stays out, as in torch.
    """
    wide = g.to(moments.dtype)
    if relu:
        wide = torch.where(_affine(y, moments) <= 0, 0.0, wide)
    if coef.shape[0] == 1:
        return (_per_channel(coef[0]) * wide).to(y.dtype)
    a, b, c = (_per_channel(v) for v in coef)
    return (a * wide + b * (y.to(moments.dtype) - _per_channel(moments[0])) + c).to(y.dtype)


def pool_apply(y: Tensor, moments: Tensor, kernel: Pair, stride: Pair, padding: Pair, relu: bool) -> Tensor:
    """Max pool of ``act(z)``, values compared as rounded to the dtype of ``y``.

    Equivalent to: ``F.max_pool2d(F.relu(F.batch_norm(y, ...)), kernel, stride, padding)``
    """
    return F.max_pool2d(bn_apply(y, moments, None, None, 1, 0, relu), kernel, stride, padding)


def pool_bwd(
    dout: Tensor, y: Tensor, moments: Tensor, kernel: Pair, stride: Pair, padding: Pair, relu: bool
) -> tuple[Tensor, Tensor]:
    """Backward of `pool_apply`: ``(g, sums)``. The arg-max is recomputed from ``y``, no indices are kept.

    The first of equal values wins and the last NaN wins, as in torch.
    """
    act = bn_apply(y, moments, None, None, 1, 0, relu)
    _, indices = F.max_pool2d(act, kernel, stride, padding, return_indices=True)
    g = torch.ops.aten.max_pool2d_with_indices_backward(dout, act, kernel, stride, padding, (1, 1), False, indices)
    if relu:
        g = torch.where(_affine(y, moments) <= 0, 0.0, g)
    return g, _sums(g.to(moments.dtype), y, moments)
