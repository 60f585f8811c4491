"""Convolution forward as an implicit GEMM that normalises on load and reduces statistics on store.

    y[n,p,q,k] = sum_rsc act(x)[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c] * w[k,r,s,c]

    operand      shape (channels_last)           moved once each
    x, residual  (N, C, H, W)                    read; padding is zero after the activation
    w            (K, R, S, C)                    read
    y            (N, K, P, Q)                    written, rounded to the dtype of x
    out          (N, C, H, W)                    written by a join: the activation itself, for the skip
    mask         (N, H, W, C / 8) uint8          written by a join where wanted: a bit per element, set unless out <= 0
    partials     (tiles, 3, K) float32           written: count, mean, M2 of y as stored

Prologue: none | pending: act = relu(z) of the previous site | join: act = relu(z + shortcut), where the
shortcut is a tensor or a projection with its own moments. Epilogue: y alone | y and partials | in eval mode
``relu(scale * (y - mean) + shift + residual)``, the whole end of a block.
FLOPs: 2 N P Q K C R S, accumulated in float32. A 3x3 of 256 channels in bf16 does about 1,150 FLOP per
byte and is bound by the tensor cores (A100 156, H100 295 FLOP per byte: modelled); a 1x1 from 64 to 256
channels does about 50 and is bound by bandwidth.
Refused: groups (the library variant runs them).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import target
from .blocks import affine, load_affine, pack_bits, relu, tile_statistics
from .geometry import PLAIN, Geometry, Prologue, channels_last_empty, precision
from .launch import Moved, launch
from .tiles import Problem, Tile, choose


class Epilogue(NamedTuple):
    """What happens to ``y`` before it is stored.

    ``kind``: raw | statistics | activation (eval mode: ``act(scale * (y - mean) + shift + residual)``).
    """

    kind: str = "raw"
    moments: Tensor | None = None  # (5, K) float32
    residual: Tensor | None = None  # (N, K, P, Q)
    relu: bool = True


RAW = Epilogue()
_EPILOGUES = {"raw": 0, "statistics": 1, "activation": 2}


@triton.jit
def _store_bits(mask_ptr, x, at_pixel, tile, keep, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Store the mask of the activations ``x`` of one tile of channels; ``at_pixel``: element offsets of the pixels."""
    offs_byte = tile * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)
    bits = pack_bits((x.to(tl.float32) <= 0) == 0, ROWS, CHANNELS)
    tl.store(
        mask_ptr + (at_pixel // 8)[:, None] + offs_byte[None, :],
        bits,
        mask=keep[:, None] & (offs_byte * 8 < C)[None, :],
    )


@triton.jit
def _conv_fwd_kernel(
    x_ptr,  # (N, H, ROW, PIXEL): pixels of a row are PIXEL elements apart, rows ROW pixels
    w_ptr,  # (K, R, S, C)
    y_ptr,  # (N, P, Q, K)
    partials_ptr,  # (tiles, 3, K) float32
    moments_ptr,  # (5, C) of the source, or (5, K) of the eval epilogue, float32
    residual_ptr,  # the join's shortcut like x, or the eval epilogue's like y
    residual_moments_ptr,  # (5, C) of a projection, float32
    out_ptr,  # (N, H, W, C)
    mask_ptr,  # (N, H, W, C / 8) uint8
    NPQ,  # N * P * Q
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
    SOURCE: tl.constexpr,  # 0 plain, 1 pending, 2 join
    SOURCE_RELU: tl.constexpr,
    SHORTCUT: tl.constexpr,  # 0 none, 1 a tensor, 2 a projection's raw output
    BITS: tl.constexpr,  # write the mask
    EPILOGUE: tl.constexpr,  # 0 raw, 1 statistics, 2 activation
    RELU: tl.constexpr,  # of the eval epilogue
    PRECISION: tl.constexpr,
    BLOCK_NPQ: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    K_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0
    pid_npq = tl.program_id(0) // K_TILES
    pid_k = tl.program_id(0) % K_TILES
    offs_npq = pid_npq * BLOCK_NPQ + tl.arange(0, BLOCK_NPQ)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_npq = offs_npq < NPQ
    mask_k = offs_k < K
    # Rows beyond the end read the last one: their addresses stay valid, and only the store is masked.
    row = tl.minimum(offs_npq, NPQ - 1)
    q = row % Q
    p = row // Q % P
    n = row // Q // P
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    x_image = n.to(tl.int64) * IMAGE
    x_pixel = h0 * ROW + w0

    acc = tl.zeros((BLOCK_NPQ, BLOCK_K), tl.float32)
    for step in range(R * S * C_TILES):
        tap = step // C_TILES
        r = tap // S
        s = tap % S
        offs_c = (step % C_TILES) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask_pixel = mask_npq
        if PADDED:
            h = h0 + r * DIL_H
            w = w0 + s * DIL_W
            mask_pixel = mask_pixel & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        mask_x = mask_pixel[:, None] & mask_c[None, :]
        pixel = (x_pixel + r * DIL_H * ROW + s * DIL_W).to(tl.int64) * PIXEL
        at_pixel = x_image + pixel
        offs_x = at_pixel[:, None] + offs_c[None, :]
        offs_w = offs_k[None, :] * (R * S * C) + tap * C + offs_c[:, None]
        if PADDED or not EVEN_C:
            x = tl.load(x_ptr + offs_x, mask=mask_x, other=0.0)
        else:
            x = tl.load(x_ptr + offs_x)
        wt = tl.load(w_ptr + offs_w, mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        if SOURCE > 0:
            mean, scale, shift = load_affine(moments_ptr, offs_c, C, mask_c)
            z = affine(x, mean[None, :], scale[None, :], shift[None, :])
            if SHORTCUT > 0:
                residual = tl.load(residual_ptr + offs_x, mask=mask_x, other=0.0)
                if SHORTCUT == 2:
                    mean, scale, shift = load_affine(residual_moments_ptr, offs_c, C, mask_c)
                    residual = affine(residual, mean[None, :], scale[None, :], shift[None, :]).to(x.dtype)
                z = z.to(x.dtype).to(tl.float32) + residual.to(tl.float32)
            if SOURCE_RELU:
                z = relu(z)
            x = tl.where(mask_x, z, 0.0).to(x.dtype)
            if SOURCE == 2:
                # Each input pixel has one owner among the taps, and the first tile of K stores it.
                owner_h = (r * DIL_H >= PAD_H) & (r * DIL_H < PAD_H + STRIDE_H)
                owner_w = (s * DIL_W >= PAD_W) & (s * DIL_W < PAD_W + STRIDE_W)
                owner = (pid_k == 0) & owner_h & owner_w
                tl.store(out_ptr + offs_x, x, mask=mask_x & owner)
                if BITS:
                    _store_bits(mask_ptr, x, at_pixel, step % C_TILES, mask_pixel & owner, C, BLOCK_NPQ, BLOCK_C)
        acc = tl.dot(x, wt, acc, input_precision=PRECISION)

    mask_y = mask_npq[:, None] & mask_k[None, :]
    offs_y = offs_npq.to(tl.int64)[:, None] * K + offs_k[None, :]
    if EPILOGUE == 2:
        mean, scale, shift = load_affine(moments_ptr, offs_k, K, mask_k)
        z = affine(acc.to(y_ptr.dtype.element_ty), mean[None, :], scale[None, :], shift[None, :])
        if SHORTCUT > 0:
            residual = tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0)
            z = z.to(y_ptr.dtype.element_ty).to(tl.float32) + residual.to(tl.float32)
        acc = relu(z) if RELU else z
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_y, y, mask=mask_y)
    if EPILOGUE == 1:
        count, mean, m2 = tile_statistics(y.to(tl.float32), mask_npq[:, None])
        at = partials_ptr + pid_npq.to(tl.int64) * 3 * K + offs_k
        tl.store(at, count + tl.zeros_like(mean), mask=mask_k)
        tl.store(at + K, mean, mask=mask_k)
        tl.store(at + 2 * K, m2, mask=mask_k)


def problem(geometry: Geometry, dtype: torch.dtype, prologue: Prologue) -> Problem:
    """The matrix product of a forward convolution."""
    loads = 2 if prologue.residual is not None else 1
    exact = dtype == torch.float32 and precision(dtype) == "ieee"
    return Problem("fwd", geometry.npq, geometry.k, geometry.c, geometry.r * geometry.s, dtype, loads, exact)


def conv_fwd(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    prologue: Prologue = PLAIN,
    epilogue: Epilogue = RAW,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(y, partials, out)``; partials with the statistics epilogue, out with a join prologue, else None.

    Args:
        x: (N, C, H, W) channels_last, bf16, fp16 or fp32.  weight: (K, R, S, C) contiguous, dtype of ``x``.
        tile: None lets `tiles.choose` pick.

    Raises:
        ValueError: a prologue beside the activation epilogue, which would share its moments.

    Equivalent to: ``y = F.conv2d(out, weight.permute(0, 3, 1, 2), None, stride, padding, dilation)``,
    ``out = F.relu(F.batch_norm(x, ...) + residual)``, ``partials`` as `reference.bn_stats` per tile
    """
    if epilogue.kind == "activation" and prologue.kind != "plain":
        raise ValueError(f"conv_fwd: prologue: expected 'plain' with an activation epilogue, got {prologue.kind!r}")
    tile = tile or choose(problem(geometry, x.dtype, prologue), target.of(x.device))
    y = channels_last_empty(x, geometry.n, geometry.k, geometry.p, geometry.q)
    out = channels_last_empty(x, *x.shape) if prologue.kind == "join" else None
    tiles = triton.cdiv(geometry.npq, tile.rows)
    partials = None
    if epilogue.kind == "statistics":
        partials = x.new_empty((max(tiles, 1), 3, geometry.k), dtype=torch.float32)
        if not tiles:
            partials.zero_()
    evaluates = epilogue.kind == "activation"
    moments = epilogue.moments if evaluates else prologue.moments
    residual = epilogue.residual if evaluates else prologue.residual
    launch(
        _conv_fwd_kernel,
        (tiles * triton.cdiv(geometry.k, tile.cols),),
        Moved(
            ((geometry.touched(x), *(() if residual is None else (residual,))), (y, out, prologue.mask)),
            ((weight,), ()),
            ((moments, prologue.residual_moments), (partials,)),
            geometry.flops,
        ),
        {
            "x_ptr": x,
            "w_ptr": weight,
            "y_ptr": y,
            "partials_ptr": partials,
            "moments_ptr": moments,
            "residual_ptr": residual,
            "residual_moments_ptr": prologue.residual_moments,
            "out_ptr": out,
            "mask_ptr": prologue.mask,
            "NPQ": geometry.npq,
            "H": geometry.h,
            "W": geometry.w,
            "P": geometry.p,
            "Q": geometry.q,
            "ROW": geometry.row,
            "IMAGE": geometry.image,
        },
        {
            **geometry.constants(),
            **prologue.constants(),
            "SHORTCUT": 0 if residual is None else 1 if prologue.residual_moments is None else 2,
            "EPILOGUE": _EPILOGUES[epilogue.kind],
            "RELU": epilogue.relu,
            "PRECISION": precision(x.dtype),
            "BLOCK_NPQ": tile.rows,
            "BLOCK_K": tile.cols,
            "BLOCK_C": tile.depth,
            **tile.options(),
        },
    )
    return y, partials, out
