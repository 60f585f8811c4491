"""Backward of batch norm: the mask, the two sums per channel, and the affine of the gradient.

    bn_bwd_reduce           g = mask(dout); sums = (sum g, sum g * xhat)
    bn_bwd_reduce_rebuild   the same, and act(z) as the forward stored it, in the same pass
    bn_bwd_finalize         sums, moments -> coef (3, C), or (1, C) with running statistics
    bn_bwd_apply            dy = a * g + b * (y - mean) + c, or a * g with running statistics: y is then not read

xhat = (y - mean) * rstd; the mask is z <= 0, false for a NaN. Activations (N, C, H, W) channels_last; moments (5, C),
sums (2, C) and coef float32; sums accumulate in float32, in a fixed order.

Bytes, each tensor once: reduce reads dout and y, and writes act when it rebuilds it; apply reads g and y and writes
dy. 6 to 12 FLOPs per element, so at most 3 FLOPs per byte in bfloat16 where the A100's ridge is 156 (312 TFLOP/s over
2.0 TB/s) and the H100's 295 (989 over 3.35): bound by bandwidth. For (256, 64, 112, 112) in bfloat16, 411 MB a tensor:
reduce modelled 411 us and 245 us, apply 617 us and 368 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import affine, bn_dy, load_affine, load_coefficients, load_normaliser, masked, relu
from .launch import Moved, launch
from .reduce import RowTiles, channels_last, row_tile, rows_of, store_sums, sum_rows


@triton.jit
def _bn_bwd_reduce_kernel(
    dout_ptr,  # (rows, C)
    y_ptr,  # (rows, C)
    moments_ptr,  # (5, C) float32
    act_ptr,  # (rows, C) or None
    partials_ptr,  # (programs, 2, C) float32
    rows,
    C,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN_C: tl.constexpr,
):
    C = C // ALIGN_C * ALIGN_C
    blocks_c = tl.cdiv(C, BLOCK_C)
    program, programs = tl.program_id(0) // blocks_c, tl.num_programs(0) // blocks_c
    offs_c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = load_normaliser(moments_ptr, offs_c, C, offs_c < C)
    if RELU or act_ptr is not None:
        mean, scale, shift = load_affine(moments_ptr, offs_c, C, offs_c < C)

    sum_g, sum_g_xhat = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32), tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        offs, mask, _ = row_tile(start, rows, offs_c, C, BLOCK_ROWS)
        g = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0)
        if RELU or act_ptr is not None:
            z = affine(y, mean[None, :], scale[None, :], shift[None, :])
        if RELU:
            g = masked(g, z)
        if act_ptr is not None:
            act = z
            if RELU:
                act = relu(z)
            tl.store(act_ptr + offs, act.to(y.dtype), mask=mask)
        sum_g += g
        sum_g_xhat += tl.where(mask, g * ((y.to(tl.float32) - mean[None, :]) * rstd[None, :]), 0.0)

    store_sums(partials_ptr, program, sum_g, sum_g_xhat, offs_c, C)


@triton.jit
def _bn_bwd_finalize_kernel(
    sums_ptr,  # (2, C) float32
    moments_ptr,  # (5, C) float32
    coef_ptr,  # (3, C) float32, or (1, C) with running statistics
    C,
    TRAINING: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    if TRAINING:
        a, b, c = load_coefficients(moments_ptr, sums_ptr, offs_c, C, mask_c)
        tl.store(coef_ptr + C + offs_c, b, mask=mask_c)
        tl.store(coef_ptr + 2 * C + offs_c, c, mask=mask_c)
    else:
        a = tl.load(moments_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    tl.store(coef_ptr + offs_c, a, mask=mask_c)


@triton.jit
def _bn_bwd_apply_kernel(
    g_ptr,  # (rows, C)
    y_ptr,  # (rows, C)
    moments_ptr,  # (5, C) float32
    coef_ptr,  # (3, C) float32, or (1, C) with running statistics
    dy_ptr,  # (rows, C)
    rows,
    C,
    RELU: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN_C: tl.constexpr,
):
    C = C // ALIGN_C * ALIGN_C
    blocks_c = tl.cdiv(C, BLOCK_C)
    start = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_ROWS
    offs_c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs, mask, _ = row_tile(start, rows, offs_c, C, BLOCK_ROWS)

    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(coef_ptr + offs_c, mask=mask_c, other=0.0)
    if TRAINING or RELU:
        y = tl.load(y_ptr + offs, mask=mask, other=0.0)
        mean = tl.load(moments_ptr + offs_c, mask=mask_c, other=0.0)
    if RELU:
        mean, scale, shift = load_affine(moments_ptr, offs_c, C, mask_c)
        g = masked(g, affine(y, mean[None, :], scale[None, :], shift[None, :]))
    if TRAINING:
        b = tl.load(coef_ptr + C + offs_c, mask=mask_c, other=0.0)
        c = tl.load(coef_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
        dy = bn_dy(g, y, mean[None, :], a[None, :], b[None, :], c[None, :])
    else:
        dy = a[None, :] * g

    tl.store(dy_ptr + offs, dy.to(dy_ptr.dtype.element_ty), mask=mask)


def _reduce(dout: Tensor, y: Tensor, moments: Tensor, relu: bool, rebuild: bool) -> tuple[Tensor, Tensor | None]:
    dout, y = channels_last(dout), channels_last(y)
    tiles = RowTiles(rows_of(y), y.shape[1])
    act = torch.empty_like(y, memory_format=torch.channels_last) if rebuild else None
    partials = moments.new_empty((tiles.reducers, 2, y.shape[1]))
    launch(
        _bn_bwd_reduce_kernel,
        tiles.reducing_grid,
        Moved(
            activations=((dout, y), (act,)),
            partials=([moments[: 4 if relu or rebuild else 2]], (partials,)),
        ),
        {
            "dout_ptr": dout,
            "y_ptr": y,
            "moments_ptr": moments,
            "act_ptr": act,
            "partials_ptr": partials,
            "rows": tiles.rows,
            "C": tiles.channels,
        },
        {"RELU": relu, **tiles.config},
    )
    return sum_rows(partials), act


def bn_bwd_reduce(dout: Tensor, y: Tensor, moments: Tensor, relu: bool) -> Tensor:
    """``sums`` ``(2, C)`` of the masked gradient. See `reference.bn_bwd_reduce`."""
    return _reduce(dout, y, moments, relu, False)[0]


def bn_bwd_reduce_rebuild(dout: Tensor, y: Tensor, moments: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """``(sums, act)``, ``act`` ``(N, C, H, W)`` channels_last. See `reference.bn_bwd_reduce_rebuild`."""
    sums, act = _reduce(dout, y, moments, relu, True)
    assert act is not None
    return sums, act


def bn_bwd_finalize(sums: Tensor, moments: Tensor, training: bool) -> Tensor:
    """``coef`` ``(3, C)``, or ``(1, C)`` with running statistics. See `reference.bn_bwd_finalize`."""
    c, block_c = moments.shape[1], 128
    sums = sums.contiguous()
    coef = moments.new_empty((3 if training else 1, c))
    read = (sums, moments[1:3], moments[4]) if training else (moments[2],)
    launch(
        _bn_bwd_finalize_kernel,
        (triton.cdiv(c, block_c),),
        Moved(partials=(read, (coef,))),
        {"sums_ptr": sums, "moments_ptr": moments, "coef_ptr": coef, "C": c},
        {"TRAINING": training, "BLOCK_C": block_c, "num_warps": 4},
    )
    return coef


def bn_bwd_apply(g: Tensor, y: Tensor, moments: Tensor, coef: Tensor, relu: bool) -> Tensor:
    """``dy`` ``(N, C, H, W)`` channels_last, dtype of ``y``. See `reference.bn_bwd_apply`."""
    g, training = channels_last(g), coef.shape[0] == 3
    dy = torch.empty_like(y, memory_format=torch.channels_last)
    tiles = RowTiles(rows_of(y), y.shape[1])
    read = [g]
    vectors = [coef]
    if training or relu:
        y = channels_last(y)
        read.append(y)
        vectors.append(moments[0])
    if relu:
        vectors.append(moments[2:4])
    launch(
        _bn_bwd_apply_kernel,
        tiles.grid,
        Moved(activations=(read, (dy,)), partials=(vectors, ())),
        {
            "g_ptr": g,
            "y_ptr": y,
            "moments_ptr": moments,
            "coef_ptr": coef,
            "dy_ptr": dy,
            "rows": tiles.rows,
            "C": tiles.channels,
        },
        {"RELU": relu, "TRAINING": training, **tiles.config},
    )
    return dy
