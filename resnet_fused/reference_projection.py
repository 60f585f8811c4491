"""The specification of the projection shortcut: the strided 1x1 convolution, forward and backward, fused.

``x`` is ``(N, C, H, W)``, ``weight`` ``(K, C, 1, 1)``, ``y`` and ``g`` ``(N, K, P, Q)`` with P = ceil(H / stride);
moments, partials and sums are those of `resnet_fused.reference`. Any float dtype (float64 for tests).

    forward    y = conv(x, w) + bias          out = act(affine(y) + affine(add))
    backward   dy = a * g + b * (y - mean) + c, made of moments and sums while the gradient is loaded
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .reference import Pair, bn_bwd_apply, bn_bwd_finalize, bn_stats, opmath


def _affine(y: Tensor, moments: Tensor | None) -> Tensor:
    y = y.to(opmath(y.dtype))
    if moments is None:
        return y
    mean, _, scale, shift, _ = moments[:, :, None, None]
    return scale * (y - mean) + shift


def projection_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    stats: bool,
    moments: Tensor | None,
    add: Tensor | None,
    add_moments: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """``(out, partials)``: the projection, and in inference the whole end of the block.

    Args:
        x: ``(N, C, H, W)``.  weight: ``(K, C, 1, 1)``, dtype of ``x``.  bias: ``(K,)`` or None.
        stats: whether ``partials`` ``(T, 3, K)`` of what is stored are made; else they are ``(0, 3, K)``.
        moments: ``(5, K)``, the affine of the projection's own batch norm, or None.
        add, add_moments: the main branch ``(N, K, P, Q)`` and the affine of its last batch norm, or None.

    Nothing is rounded between the product and ``out``.

    Equivalent to: ``F.relu(F.batch_norm(F.conv2d(x, weight, bias, stride), ...) + F.batch_norm(add, ...))``
    """
    y = _affine(F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride), moments)
    if add is not None:
        y = y + _affine(add, add_moments)
    out = (torch.where(y <= 0, 0.0, y) if relu else y).to(x.dtype)
    return out, bn_stats(out) if stats else y.new_empty((0, 3, y.shape[1]))


def _gradient(g: Tensor, y: Tensor | None, moments: Tensor | None, sums: Tensor | None) -> Tensor:
    """``dy``: of batch statistics with ``sums``, of running ones with ``moments`` alone, ``g`` itself with neither."""
    if moments is None:
        return g
    if sums is None:
        return bn_bwd_apply(g, g, moments, moments[2:3], False)
    if y is None:
        raise ValueError("projection: y: expected the stored output, which sums need, got None")
    return bn_bwd_apply(g, y, moments, bn_bwd_finalize(sums, moments, True), False)


def projection_dgrad(
    g: Tensor,
    y: Tensor | None,
    weight: Tensor,
    moments: Tensor | None,
    sums: Tensor | None,
    size: Pair,
    stride: Pair,
    add: Tensor | None,
) -> Tensor:
    """``dx`` ``(N, C, H, W)``: the gradient of ``x`` where the projection read it, zero elsewhere, plus ``add``.

    Args:
        g: ``(N, K, P, Q)``, gradient of the batch norm's output, masked; of ``y`` itself without ``moments``.
        y: the stored output; used with ``sums`` only.
        moments, sums: ``(5, K)`` and ``(2, K)``; without ``sums`` the statistics are running ones.
        size: ``(H, W)``.
        add: ``(N, C, H, W)``, the main branch's gradient of ``x``, or None.

    Equivalent to: ``torch.nn.grad.conv2d_input(size, weight, dy, stride) + add``
    """
    dy = _gradient(g, y, moments, sums)
    dx = conv2d_input((g.shape[0], weight.shape[1], *size), weight, dy, stride)
    return dx if add is None else dx + add


def projection_wgrad(
    g: Tensor,
    y: Tensor | None,
    x: Tensor,
    moments: Tensor | None,
    sums: Tensor | None,
    stride: Pair,
    dtype: torch.dtype,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """``(dweight, dbias)``: ``(K, C, 1, 1)`` in ``dtype``, and ``(K,)`` in at least float32, ``(0,)`` without ``bias``.

    ``dtype`` is that of ``x``, or float32 for a master weight. See `projection_dgrad` for the other arguments.

    Equivalent to: ``torch.nn.grad.conv2d_weight(x, (K, C, 1, 1), dy, stride)`` and ``dy.sum((0, 2, 3))``
    """
    dy = _gradient(g, y, moments, sums)
    dweight = conv2d_weight(x, (g.shape[1], x.shape[1], 1, 1), dy, stride)
    wide = dy.to(opmath(dy.dtype))
    return dweight.to(dtype), wide.sum((0, 2, 3)) if bias else wide.new_empty(0)
