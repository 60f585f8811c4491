"""Convolution backward for the input, with batch norm's backward on load and the next mask and sums on store.

    dy = a * g + b * (y - mean) + c                         prologue, per channel k; g masked by z <= 0 first
    dx[n,h,w,c] = sum_rsk dy[n,p,q,k] * w[k,r,s,c]          where h = p*stride - pad + r*dil

    operand            shape (channels_last)     moved once each
    g, y               (N, K, P, Q)              read
    w                  (K, R, S, C)              read
    dx                 (N, C, H, W)              written
    dskip              (N, C, H, W)              read: the skip's gradient, or (N, C, H / s, W / s) of every s-th pixel
    out, or mask       (N, C, H, W) or its bits  read by a join with ReLU: the stored activation, or where it passed
    prev_y             (N, C, H, W)              read by pending and join epilogues, for mask and sums
    residual_y         (N, C, H, W)              read by a join with a projection, for its sums
    partials           (tiles, 2 or 4, C) f32    written: sum g, sum g*xhat of the previous site (and projection)

Epilogue: none | add a given gradient, out of place | pending: mask by the previous site's z, reduce | join: add
the skip's gradient, mask by ``out`` (a NaN passes), reduce. A stride splits the pixels of the input by parity:
each program serves one class and visits the taps that reach it, so nothing is multiplied with inserted zeros; a
class that no tap reaches stores zeros (plus the given gradient).
FLOPs: 2 N P Q K C R S, accumulated in float32; intensity and roofline are those of `conv_fwd` with g and y read
(a 1x1 from 256 to 64 channels about 28 FLOP per byte: bound by bandwidth, modelled).
Refused: groups (the library variant runs them).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import target
from .blocks import affine, load_affine, load_normaliser, masked, product, unpack_bits
from .geometry import Geometry, channels_last_empty, precision
from .gradient import Gradient, load_dy, load_norm
from .launch import Moved, launch
from .reduce import sum_rows
from .tiles import Problem, Tile, choose


class DgradEpilogue(NamedTuple):
    """What happens to ``dx`` before it is stored; see the module."""

    kind: str = "plain"  # plain | pending | join
    dskip: Tensor | None = None
    prev_y: Tensor | None = None
    prev_moments: Tensor | None = None
    out: Tensor | None = None  # of a join with ReLU: the activation, or its mask of bits (uint8)
    relu: bool = True  # of a pending source
    residual_y: Tensor | None = None
    residual_moments: Tensor | None = None
    skip_stride: int = 1  # dskip holds every skip_stride-th pixel alone


RAW_DX = DgradEpilogue()


@triton.jit
def _first_tap(parity, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, TAPS: tl.constexpr):
    """The first tap that reaches pixels of this parity, or TAPS."""
    first = TAPS
    for i in tl.static_range(TAPS):
        reaches = (parity + PAD - (TAPS - 1 - i) * DIL + TAPS * DIL * STRIDE) % STRIDE == 0
        first = tl.where(reaches, TAPS - 1 - i, first)
    return first


@triton.jit
def _store_sums(at, g, mask, y_ptr, moments_ptr, offs, offs_c, mask_c, C: tl.constexpr):
    """Store this tile's ``sum g`` and ``sum g * xhat``; ``g`` float32, zero where ``mask`` is off."""
    mean, rstd = load_normaliser(moments_ptr, offs_c, C, mask_c)
    y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    xhat = tl.where(mask, (y - mean[None, :]) * rstd[None, :], 0.0)
    tl.store(at, tl.sum(g, 0), mask=mask_c)
    tl.store(at + C, tl.sum(product(g, xhat), 0), mask=mask_c)


@triton.jit
def _conv_dgrad_kernel(
    g_ptr,  # (N, P, Q, K)
    y_ptr,  # (N, P, Q, K)
    moments_ptr,  # (5, K) float32
    sums_ptr,  # (2, K) float32
    w_ptr,  # (K, R, S, C)
    dx_ptr,  # (N, H, W, C)
    dskip_ptr,  # (N, H / ADD, W / ADD, C), rounded up
    prev_y_ptr,  # (N, H, W, C)
    prev_moments_ptr,  # (5, C) float32
    out_ptr,  # (N, H, W, C), or (N, H, W, C / 8) uint8
    residual_y_ptr,  # (N, H, W, C)
    residual_moments_ptr,  # (5, C) float32
    partials_ptr,  # (tiles, 2 or 4, C) float32
    ROWS,  # N * CLASS_H * CLASS_W: the pixels of one parity class
    H,
    W,
    P,
    Q,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    STEP_R: tl.constexpr,  # taps of one class are STEP_R apart
    STEP_S: tl.constexpr,
    NORM: tl.constexpr,  # 0: g is dy; 1: batch statistics; 2: running statistics
    MASK: tl.constexpr,  # mask g by the site's own z
    EPILOGUE: tl.constexpr,  # 0 plain, 1 pending, 2 join
    ADD: tl.constexpr,  # 0, or add dskip to every ADD-th pixel of every ADD-th row
    RELU: tl.constexpr,  # mask by prev_y (pending) or out (join)
    BITS: tl.constexpr,  # out is a mask of bits
    PROJECTION: tl.constexpr,  # a join's shortcut has sums of its own
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    K_TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid_rows = tl.program_id(0) // C_TILES
    pid_c = tl.program_id(0) % C_TILES
    parity_h = tl.program_id(1) // STRIDE_W
    parity_w = tl.program_id(1) % STRIDE_W
    class_h = (H + STRIDE_H - 1) // STRIDE_H
    class_w = (W + STRIDE_W - 1) // STRIDE_W
    offs_row = pid_rows * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(offs_row, ROWS - 1)
    h = row // class_w % class_h * STRIDE_H + parity_h
    w = row % class_w * STRIDE_W + parity_w
    n = row // class_w // class_h
    mask_row = (offs_row < ROWS) & (h < H) & (w < W)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first_r = _first_tap(parity_h, STRIDE_H, PAD_H, DIL_H, R)
    first_s = _first_tap(parity_w, STRIDE_W, PAD_W, DIL_W, S)
    taps_r = (R - first_r + STEP_R - 1) // STEP_R
    taps_s = (S - first_s + STEP_S - 1) // STEP_S

    acc = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for step in range(taps_r * taps_s * K_TILES):
        tap = step // K_TILES
        r = first_r + tap // tl.maximum(taps_s, 1) * STEP_R  # the division may be hoisted above a loop of no step
        s = first_s + tap % tl.maximum(taps_s, 1) * STEP_S
        p = (h + PAD_H - r * DIL_H) // STRIDE_H
        q = (w + PAD_W - s * DIL_W) // STRIDE_W
        inside = (h + PAD_H >= r * DIL_H) & (p < P) & (w + PAD_W >= s * DIL_W) & (q < Q)
        offs_k = (step % K_TILES) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        offs_dy = ((n * P + p) * Q + q).to(tl.int64)[:, None] * K + offs_k[None, :]
        norm = load_norm(moments_ptr, sums_ptr, offs_k, K, mask_k, NORM) if NORM > 0 else 0
        dy = load_dy(g_ptr, y_ptr, offs_dy, inside[:, None] & mask_k[None, :], norm, NORM, MASK)
        offs_w = offs_k[:, None] * (R * S * C) + (r * S + s) * C + offs_c[None, :]
        wt = tl.load(w_ptr + offs_w, mask=mask_k[:, None] & mask_c[None, :], other=0.0)
        acc = tl.dot(dy, wt, acc, input_precision=PRECISION)

    mask = mask_row[:, None] & mask_c[None, :]
    offs = ((n * H + h) * W + w).to(tl.int64)[:, None] * C + offs_c[None, :]
    dtype = dx_ptr.dtype.element_ty
    if ADD > 0:
        hit = mask_row & (h % ADD == 0) & (w % ADD == 0)
        at_skip = (n * ((H + ADD - 1) // ADD) + h // ADD) * ((W + ADD - 1) // ADD) + w // ADD
        offs_skip = at_skip.to(tl.int64)[:, None] * C + offs_c[None, :]
        dskip = tl.load(dskip_ptr + offs_skip, mask=hit[:, None] & mask_c[None, :], other=0.0)
        acc = acc.to(dtype).to(tl.float32) + dskip.to(tl.float32)
    if EPILOGUE == 1 and RELU:
        mean, scale, shift = load_affine(prev_moments_ptr, offs_c, C, mask_c)
        prev = tl.load(prev_y_ptr + offs, mask=mask, other=0.0)
        acc = masked(acc, affine(prev, mean[None, :], scale[None, :], shift[None, :]))
    if EPILOGUE == 2 and RELU and BITS:
        offs_byte = pid_c * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        offs_mask = ((n * H + h) * W + w).to(tl.int64)[:, None] * (C // 8) + offs_byte[None, :]
        bits = tl.load(out_ptr + offs_mask, mask=mask_row[:, None] & (offs_byte * 8 < C)[None, :], other=0)
        acc = tl.where(unpack_bits(bits, BLOCK_ROWS, BLOCK_C) > 0, acc, 0.0)
    if EPILOGUE == 2 and RELU and not BITS:
        acc = masked(acc, tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    dx = acc.to(dtype)
    tl.store(dx_ptr + offs, dx, mask=mask)
    if EPILOGUE > 0:
        g = tl.where(mask, dx.to(tl.float32), 0.0)
        tiles = (tl.num_programs(0) // C_TILES).to(tl.int64)
        SUMS: tl.constexpr = 4 if PROJECTION else 2
        at = partials_ptr + (tl.program_id(1) * tiles + pid_rows) * SUMS * C + offs_c
        _store_sums(at, g, mask, prev_y_ptr, prev_moments_ptr, offs, offs_c, mask_c, C)
        if PROJECTION:
            _store_sums(at + 2 * C, g, mask, residual_y_ptr, residual_moments_ptr, offs, offs_c, mask_c, C)


def problem(geometry: Geometry, gradient: Gradient) -> Problem:
    """The matrix product of a dgrad: one parity class of the pixels."""
    dtype = gradient.g.dtype
    rows = geometry.n * triton.cdiv(geometry.h, geometry.stride[0]) * triton.cdiv(geometry.w, geometry.stride[1])
    exact = dtype == torch.float32 and precision(dtype) == "ieee"
    loads = sum(t is not None for t in gradient.reads)
    return Problem("dgrad", rows, geometry.c, geometry.k, geometry.r * geometry.s, dtype, loads, exact)


def conv_dgrad(
    gradient: Gradient,
    weight: Tensor,
    geometry: Geometry,
    epilogue: DgradEpilogue = RAW_DX,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(dx, sums)``; sums (2, C), or (4, C) of a join with a projection; None without an epilogue that reduces.

    Args:
        gradient: (N, K, P, Q) channels_last tensors, bf16, fp16 or fp32.
        weight: (K, R, S, C) contiguous, dtype of ``gradient.g``.

    Equivalent to: ``dx = torch.nn.grad.conv2d_input(..., dy) + dskip`` masked, and `reference.bn_bwd_reduce` of it
    """
    tile = tile or choose(problem(geometry, gradient), target.of(gradient.g.device))
    e = epilogue
    dx = channels_last_empty(gradient.g, geometry.n, geometry.c, geometry.h, geometry.w)
    classes = geometry.stride[0] * geometry.stride[1]
    rows = geometry.n * triton.cdiv(geometry.h, geometry.stride[0]) * triton.cdiv(geometry.w, geometry.stride[1])
    tiles = triton.cdiv(rows, tile.rows)
    partials = None
    if e.kind != "plain":
        sums = 2 if e.residual_y is None else 4
        partials = gradient.g.new_empty((classes * tiles, sums, geometry.c), dtype=torch.float32)
    masks_by_prev = e.kind == "pending" or e.prev_y is not None
    launch(
        _conv_dgrad_kernel,
        (tiles * triton.cdiv(geometry.c, tile.cols), classes),
        Moved(
            ((*gradient.reads, e.dskip, e.prev_y if masks_by_prev else None, e.out, e.residual_y), (dx,)),
            ((weight,), ()),
            ((gradient.moments, gradient.sums, e.prev_moments, e.residual_moments), (partials,)),
            geometry.flops,
        ),
        {
            "g_ptr": gradient.g,
            "y_ptr": gradient.y,
            "moments_ptr": gradient.moments,
            "sums_ptr": gradient.sums,
            "w_ptr": weight,
            "dx_ptr": dx,
            "dskip_ptr": e.dskip,
            "prev_y_ptr": e.prev_y,
            "prev_moments_ptr": e.prev_moments,
            "out_ptr": e.out,
            "residual_y_ptr": e.residual_y,
            "residual_moments_ptr": e.residual_moments,
            "partials_ptr": partials,
            "ROWS": rows,
            "H": geometry.h,
            "W": geometry.w,
            "P": geometry.p,
            "Q": geometry.q,
        },
        _constants(gradient, geometry, epilogue, tile),
    )
    return dx, None if partials is None else sum_rows(partials)


def _constants(gradient: Gradient, geometry: Geometry, e: DgradEpilogue, tile: Tile) -> dict[str, object]:
    """The compile-time arguments of `_conv_dgrad_kernel`."""
    steps = [s // math.gcd(s, d) for s, d in zip(geometry.stride, geometry.dilation, strict=True)]
    constants = geometry.constants()
    del constants["PIXEL"]
    return {
        **constants,
        "STEP_R": steps[0],
        "STEP_S": steps[1],
        **gradient.constants(),
        "EPILOGUE": {"plain": 0, "pending": 1, "join": 2}[e.kind],
        "ADD": 0 if e.dskip is None else e.skip_stride,
        "RELU": e.out is not None if e.kind == "join" else e.relu,
        "BITS": e.out is not None and e.out.dtype == torch.uint8,
        "PROJECTION": e.residual_y is not None,
        "PRECISION": precision(gradient.g.dtype),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_C": tile.cols,
        "BLOCK_K": tile.depth,
        **tile.options(),
    }
