"""Convolution backward for the weight, with batch norm's backward on one operand and BN-ReLU on the other.

    dw[k,r,s,c] = sum_npq dy[n,p,q,k] * act(x)[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c]

    operand      shape                         moved once each
    g, y         (N, K, P, Q) channels_last    read: dy = a * g + b * (y - mean) + c, g masked by z <= 0 first
    x            (N, C, H, W) channels_last    read: as it is, or as act(z) of the previous site
    partials     (SPLIT, K, R, S, C) float32   written, then read
    dw           like the parameter            written by `_dw_reduce_kernel`, in its dtype and layout

The rows NPQ are split over SPLIT programs per tile of dw; the partial products are then added in order, so
results are bitwise repeatable. A join's activation was stored by the forward, and is plain here.
FLOPs: 2 N P Q K C R S, accumulated in float32. A 3x3 of 256 channels in bf16 does about 770 FLOP per byte and
is bound by the tensor cores (A100 156, H100 295: modelled); a 1x1 from 64 to 256 channels about 28, by bandwidth.
Refused: groups (the library variant runs them).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import target
from .blocks import affine, load_affine, relu
from .geometry import PACKED_CHANNELS, PLAIN, Geometry, Prologue, precision
from .gradient import Gradient, load_dy, load_norm
from .launch import Moved, launch
from .tiles import Problem, Tile, choose

_REDUCE_BLOCK = 512


@triton.jit
def _conv_wgrad_kernel(
    g_ptr,  # (N, P, Q, K)
    y_ptr,  # (N, P, Q, K)
    moments_ptr,  # (5, K) float32
    sums_ptr,  # (2, K) float32
    x_ptr,  # (N, H, ROW, PIXEL): pixels of a row are PIXEL elements apart, rows ROW pixels
    x_moments_ptr,  # (5, C) float32
    partials_ptr,  # (SPLIT, K, R, S, C) float32
    NPQ,  # N * P * Q
    ROWS,  # of one split, a multiple of BLOCK_NPQ
    H,
    W,
    P,
    Q,
    ROW,
    IMAGE,  # elements from one image to the next
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PIXEL: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    NORM: tl.constexpr,  # 0: g is dy; 1: batch statistics; 2: running statistics
    MASK: tl.constexpr,  # mask g by the site's own z
    SOURCE: tl.constexpr,  # 0 plain, 1 pending
    SOURCE_RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
):
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid_k = tl.program_id(0) // (R * S * C_TILES)
    tap = tl.program_id(0) // C_TILES % (R * S)
    pid_c = tl.program_id(0) % C_TILES
    split = tl.program_id(1)
    r = tap // S
    s = tap % S
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_k = offs_k < K
    mask_c = offs_c < C
    norm = load_norm(moments_ptr, sums_ptr, offs_k, K, mask_k, NORM) if NORM > 0 else 0
    if SOURCE == 1:
        mean, scale, shift = load_affine(x_moments_ptr, offs_c, C, mask_c)
    first = split * ROWS
    last = tl.minimum(first + ROWS, NPQ)

    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_NPQ):
        row = start + tl.arange(0, BLOCK_NPQ)
        mask_row = row < last
        offs_dy = row.to(tl.int64)[:, None] * K + offs_k[None, :]
        dy = load_dy(g_ptr, y_ptr, offs_dy, mask_row[:, None] & mask_k[None, :], norm, NORM, MASK)
        h = row // Q % P * STRIDE_H - PAD_H + r * DIL_H
        w = row % Q * STRIDE_W - PAD_W + s * DIL_W
        image = (row // Q // P).to(tl.int64) * IMAGE
        inside = mask_row & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        mask_x = inside[:, None] & mask_c[None, :]
        offs_x = (image + (h * ROW + w).to(tl.int64) * PIXEL)[:, None] + offs_c[None, :]
        x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
        if SOURCE == 1:
            z = affine(x, mean[None, :], scale[None, :], shift[None, :])
            if SOURCE_RELU:
                z = relu(z)
            x = tl.where(mask_x, z, 0.0).to(x.dtype)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)

    at = partials_ptr + split.to(tl.int64) * (K * R * S * C)
    offs = offs_k[:, None] * (R * S * C) + tap * C + offs_c[None, :]
    tl.store(at + offs, acc, mask=mask_k[:, None] & mask_c[None, :])


@triton.jit
def _dw_reduce_kernel(
    partials_ptr,  # (SPLIT, K, R, S, TAP_C) float32; of an image packed for the stem, S * TAP_C in place of C
    dw_ptr,  # (K, R, S, C) in memory where LAST, else (K, C, R, S)
    SPLIT,
    K: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    TAP_S: tl.constexpr,  # taps of a row and channels of a tap as the partials have them
    TAP_C: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K * C * R * S
    if LAST:
        c = offs % C
        s = offs // C % S
        r = offs // (C * S) % R
    else:
        s = offs % S
        r = offs // S % R
        c = offs // (S * R) % C
    k = offs // (C * R * S)
    source = ((k * R + r) * TAP_S + s) * TAP_C + c
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        acc += tl.load(partials_ptr + tl.cast(split, tl.int64) * (K * R * TAP_S * TAP_C) + source, mask=mask, other=0.0)
    tl.store(dw_ptr + offs, acc.to(dw_ptr.dtype.element_ty), mask=mask)


def problem(geometry: Geometry, gradient: Gradient) -> Problem:
    """The matrix product of a wgrad."""
    dtype = gradient.g.dtype
    exact = dtype == torch.float32 and precision(dtype) == "ieee"
    loads = sum(t is not None for t in gradient.reads)
    return Problem("wgrad", geometry.k, geometry.c, geometry.npq, geometry.r * geometry.s, dtype, loads, exact)


def conv_wgrad(
    gradient: Gradient,
    x: Tensor,
    geometry: Geometry,
    weight: Tensor,
    prologue: Prologue = PLAIN,
    tile: Tile | None = None,
) -> Tensor:
    """``dw`` in the shape (K, C, R, S), dtype and strides of ``weight``.

    Args:
        x: (N, C, H, W) channels_last, the convolved activation (plain) or the raw output it is made of (pending).

    Equivalent to: ``torch.nn.grad.conv2d_weight(act(x), weight.shape, dy, stride, padding, dilation)``
    """
    tile = tile or choose(problem(geometry, gradient), target.of(x.device))
    g = geometry
    steps = triton.cdiv(g.npq, tile.depth)
    rows = triton.cdiv(steps, tile.split) * tile.depth
    split = triton.cdiv(g.npq, rows) if rows else 0
    partials = x.new_empty((split, g.k, g.r, g.s, g.c), dtype=torch.float32)
    launch(
        _conv_wgrad_kernel,
        (triton.cdiv(g.k, tile.rows) * g.r * g.s * triton.cdiv(g.c, tile.cols), split),
        Moved(
            ((*gradient.reads, g.touched(x)), ()),
            partials=((gradient.moments, gradient.sums, prologue.moments), (partials,)),
            flops=g.flops,
        ),
        {
            "g_ptr": gradient.g,
            "y_ptr": gradient.y,
            "moments_ptr": gradient.moments,
            "sums_ptr": gradient.sums,
            "x_ptr": x,
            "x_moments_ptr": prologue.moments,
            "partials_ptr": partials,
            "NPQ": g.npq,
            "ROWS": rows,
            "H": g.h,
            "W": g.w,
            "P": g.p,
            "Q": g.q,
            "ROW": g.row,
            "IMAGE": g.image,
        },
        {
            **g.constants(),
            **gradient.constants(),
            "SOURCE": 1 if prologue.kind == "pending" else 0,
            "SOURCE_RELU": prologue.relu,
            "PRECISION": precision(x.dtype),
            "BLOCK_K": tile.rows,
            "BLOCK_C": tile.cols,
            "BLOCK_NPQ": tile.depth,
            **tile.options(),
        },
    )
    return _reduced(partials, geometry, weight)


def _reduced(partials: Tensor, geometry: Geometry, weight: Tensor) -> Tensor:
    """The ordered sum of the partials, as a gradient of ``weight``."""
    k, c, r, s = weight.shape
    last = weight.permute(0, 2, 3, 1).is_contiguous()
    dw = torch.empty_like(weight) if last or weight.is_contiguous() else weight.new_empty(weight.shape)
    tap_c = c if geometry.c == c else PACKED_CHANNELS
    tap_s = geometry.s * geometry.c // tap_c
    read = partials.view(partials.shape[0], k, r, tap_s, tap_c)[:, :, :, :s, :c]
    launch(
        _dw_reduce_kernel,
        (triton.cdiv(dw.numel(), _REDUCE_BLOCK),),
        Moved(weights=((), (dw,)), partials=((read,), ())),
        {"partials_ptr": partials, "dw_ptr": dw, "SPLIT": partials.shape[0]},
        {
            "K": k,
            "C": c,
            "R": r,
            "S": s,
            "TAP_S": tap_s,
            "TAP_C": tap_c,
            "LAST": last,
            "BLOCK": _REDUCE_BLOCK,
            "num_warps": 4,
        },
    )
    return dw if dw.stride() == weight.stride() else torch.empty_like(weight).copy_(dw)
