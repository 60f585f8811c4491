"""Batch norm's affine, a shortcut and ReLU, over a tensor that a convolution wrote.

    out = act(z + shortcut)         z = scale * (y - mean) + shift, rounded to y's dtype where there is a shortcut
    shortcut                        none | residual | round(affine of a projection's raw output) | option A

Option A is the residual subsampled by ``residual_stride``, with ``channel_offset`` zero channels in front and zeros
behind. Shapes: y and out (N, C, P, Q) channels_last, moments (5, C) float32.

Bytes: y and the shortcut read once, out written once, a tile of rows and channels per program; the moments are read
once per tile, from cache. 4 to 8 FLOPs per element, so at most 2 FLOPs per byte in bfloat16 where the A100's ridge
is 156 (312 TFLOP/s over 2.0 TB/s) and the H100's 295 (989 over 3.35): bound by bandwidth. A join of
(256, 256, 56, 56) in bfloat16 moves 3 * 411 MB: modelled 617 us and 368 us. Computes in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty_like
from torch import channels_last as channels_last_format

from .blocks import affine, load_affine, relu
from .launch import Moved, launch
from .reduce import RowTiles, channels_last, row_tile, rows_of


@triton.jit
def _load_option_a(
    residual_ptr, start, offs_c, mask, C, P, Q, HEIGHT, WIDTH, stride, channel_offset, BLOCK_ROWS: tl.constexpr
):
    """The tile of a residual ``(N, C, HEIGHT, WIDTH)`` that rows from ``start`` of an output ``(N, ., P, Q)`` add."""
    offs_rows = start + tl.arange(0, BLOCK_ROWS)
    n, p, q = offs_rows // (P * Q), offs_rows // Q % P, offs_rows % Q
    pixel = (n * HEIGHT + p * stride) * WIDTH + q * stride
    offs_from = offs_c - channel_offset
    inside = mask & (offs_from[None, :] >= 0) & (offs_from[None, :] < C)
    return tl.load(residual_ptr + pixel[:, None] * C + offs_from[None, :], mask=inside, other=0.0)


@triton.jit
def _bn_apply_kernel(
    y_ptr,  # (rows, C)
    residual_ptr,  # (rows, C), or (N, RESIDUAL_C, HEIGHT, WIDTH) channels_last for option A, or None
    moments_ptr,  # (5, C) float32
    residual_moments_ptr,  # (5, C) float32 or None
    out_ptr,  # (rows, C)
    rows,
    C,
    P,
    Q,
    RESIDUAL_C,
    HEIGHT,
    WIDTH,
    residual_stride,
    channel_offset,
    RELU: tl.constexpr,
    OPTION_A: tl.constexpr,
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

    y = tl.load(y_ptr + offs, mask=mask, other=0.0)
    if residual_ptr is not None:
        if OPTION_A:
            residual = _load_option_a(
                residual_ptr,
                start,
                offs_c,
                mask,
                RESIDUAL_C,
                P,
                Q,
                HEIGHT,
                WIDTH,
                residual_stride,
                channel_offset,
                BLOCK_ROWS,
            )
        else:
            residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)

    mean, scale, shift = load_affine(moments_ptr, offs_c, C, mask_c)
    z = affine(y, mean[None, :], scale[None, :], shift[None, :])
    if residual_ptr is not None:
        if residual_moments_ptr is not None:
            mean, scale, shift = load_affine(residual_moments_ptr, offs_c, C, mask_c)
            residual = affine(residual, mean[None, :], scale[None, :], shift[None, :]).to(residual.dtype)
        z = z.to(y.dtype).to(tl.float32) + residual.to(tl.float32)
    if RELU:
        z = relu(z)

    tl.store(out_ptr + offs, z.to(y.dtype), mask=mask)


def affine_rows(moments: Tensor | None) -> list[Tensor]:
    """The rows of ``moments`` ``(5, C)`` that an affine reads."""
    return [] if moments is None else [moments[0], moments[2:4]]


def bn_apply(
    y: Tensor,
    moments: Tensor,
    residual: Tensor | None,
    residual_moments: Tensor | None,
    residual_stride: int,
    channel_offset: int,
    relu: bool,
) -> Tensor:
    """``act(z + shortcut)`` ``(N, C, P, Q)`` channels_last, dtype of ``y``. See `reference.bn_apply`."""
    y = channels_last(y)
    out = empty_like(y, memory_format=channels_last_format)
    touched, option_a = None, False
    if residual is not None:
        residual = channels_last(residual)
        option_a = residual_moments is None and residual.shape != y.shape
        touched = residual[:, :, ::residual_stride, ::residual_stride] if option_a else residual
    source = y if residual is None else residual
    # Option A's addresses take registers of their own.
    tiles = RowTiles(rows_of(y), y.shape[1], elements=2048 if option_a else 4096)
    launch(
        _bn_apply_kernel,
        tiles.grid,
        Moved(
            activations=((y, touched), (out,)),
            partials=([*affine_rows(moments), *affine_rows(residual_moments)], ()),
        ),
        {
            "y_ptr": y,
            "residual_ptr": residual,
            "moments_ptr": moments,
            "residual_moments_ptr": residual_moments,
            "out_ptr": out,
            "rows": tiles.rows,
            "C": tiles.channels,
            "P": y.shape[2],
            "Q": y.shape[3],
            "RESIDUAL_C": source.shape[1],
            "HEIGHT": source.shape[2],
            "WIDTH": source.shape[3],
            "residual_stride": residual_stride,
            "channel_offset": channel_offset,
        },
        {"RELU": relu, "OPTION_A": option_a, **tiles.config},
    )
    return out
