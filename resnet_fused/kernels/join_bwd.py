"""Backward of the join ``out = act(z + shortcut)``: the masked gradient, and its sums against each batch norm.

    g              = round(where(out <= 0, 0, dout + dskip))         a NaN in out passes; no mask without ReLU
    sums           = (sum g, sum g * xhat)                           xhat = (y - mean) * rstd
    residual_sums  = (sum g, sum g * xhat of the projection)         where the shortcut is a projection

Activations (N, C, P, Q) channels_last, moments (5, C) and sums (2, C) float32. g is rounded to y's dtype before it is
summed, since that is the g which the next kernels read. Sums accumulate in float32, in a fixed order.

Bytes: dout, dskip, out, y and the projection's y read once, g written once. 6 to 10 FLOPs per element, so at most
2 FLOPs per byte in bfloat16 where the A100's ridge is 156 (312 TFLOP/s over 2.0 TB/s) and the H100's 295 (989 over
3.35): bound by bandwidth. A join of (256, 256, 56, 56) in bfloat16 with a skip gradient moves 5 * 411 MB: modelled
1.03 ms and 0.61 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import load_normaliser, masked
from .launch import Moved, launch
from .reduce import RowTiles, channels_last, row_tile, rows_of, store_sums, sum_rows


@triton.jit
def _join_bwd_reduce_kernel(
    dout_ptr,  # (rows, C)
    dskip_ptr,  # (rows, C) or None
    out_ptr,  # (rows, C) or None: no ReLU
    y_ptr,  # (rows, C)
    residual_y_ptr,  # (rows, C) or None
    moments_ptr,  # (5, C) float32
    residual_moments_ptr,  # (5, C) float32 or None
    g_ptr,  # (rows, C)
    partials_ptr,  # (programs, 2, C) float32
    residual_partials_ptr,  # (programs, 2, C) float32 or None
    rows,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN_C: tl.constexpr,
):
    C = C // ALIGN_C * ALIGN_C
    blocks_c = tl.cdiv(C, BLOCK_C)
    program, programs = tl.program_id(0) // blocks_c, tl.num_programs(0) // blocks_c
    offs_c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = load_normaliser(moments_ptr, offs_c, C, offs_c < C)
    if residual_y_ptr is not None:
        residual_mean, residual_rstd = load_normaliser(residual_moments_ptr, offs_c, C, offs_c < C)

    sum_g, sum_g_xhat = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32), tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    sum_g_residual = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        offs, mask, _ = row_tile(start, rows, offs_c, C, BLOCK_ROWS)
        g = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0)
        if dskip_ptr is not None:
            g += tl.load(dskip_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is not None:
            g = masked(g, tl.load(out_ptr + offs, mask=mask, other=0.0).to(tl.float32))
        stored = g.to(y.dtype)
        g = stored.to(tl.float32)
        sum_g += g
        sum_g_xhat += tl.where(mask, g * ((y.to(tl.float32) - mean[None, :]) * rstd[None, :]), 0.0)
        if residual_y_ptr is not None:
            other = tl.load(residual_y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            xhat = (other - residual_mean[None, :]) * residual_rstd[None, :]
            sum_g_residual += tl.where(mask, g * xhat, 0.0)
        tl.store(g_ptr + offs, stored, mask=mask)

    store_sums(partials_ptr, program, sum_g, sum_g_xhat, offs_c, C)
    if residual_y_ptr is not None:
        store_sums(residual_partials_ptr, program, sum_g, sum_g_residual, offs_c, C)


def _dense(*activations: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else channels_last(t) for t in activations]


def join_bwd_reduce(
    dout: Tensor,
    dskip: Tensor | None,
    out: Tensor | None,
    y: Tensor,
    moments: Tensor,
    residual_y: Tensor | None,
    residual_moments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(g, sums, residual_sums)``, ``g`` ``(N, C, P, Q)`` channels_last. See `reference.join_bwd_reduce`."""
    projected = residual_y is not None and residual_moments is not None
    dout, y = channels_last(dout), channels_last(y)
    dskip, out, residual_y = _dense(dskip, out, residual_y if projected else None)
    residual_moments = residual_moments if projected else None
    g = torch.empty_like(y, memory_format=torch.channels_last)
    # Up to three accumulators: at this size four programs fit a multiprocessor.
    tiles = RowTiles(rows_of(y), y.shape[1], elements=1024)
    partials = moments.new_empty((tiles.reducers, 2, y.shape[1]))
    residual_partials = torch.empty_like(partials) if projected else None
    vectors = [moments[:2]] if residual_moments is None else [moments[:2], residual_moments[:2]]
    launch(
        _join_bwd_reduce_kernel,
        tiles.reducing_grid,
        Moved(
            activations=((dout, dskip, out, y, residual_y), (g,)),
            partials=(vectors, (partials, residual_partials)),
        ),
        {
            "dout_ptr": dout,
            "dskip_ptr": dskip,
            "out_ptr": out,
            "y_ptr": y,
            "residual_y_ptr": residual_y,
            "moments_ptr": moments,
            "residual_moments_ptr": residual_moments,
            "g_ptr": g,
            "partials_ptr": partials,
            "residual_partials_ptr": residual_partials,
            "rows": tiles.rows,
            "C": tiles.channels,
        },
        tiles.config,
    )
    residual_sums = moments.new_empty(0) if residual_partials is None else sum_rows(residual_partials)
    return g, sum_rows(partials), residual_sums
