"""Batch statistics: partials of the rows of y, and their merge.

    bn_stats           y (N, C, H, W) -> (T, 3, C) float32: count, mean, M2 of T disjoint sets of rows
    merge_partials     (T, 3, C) -> (1, 3, C), Chan's formula in a fixed order

A program takes a tile's mean first and its M2 about that mean, then merges the tile: never E[y^2] - E[y]^2. It does so
on differences from its first row, so that a mean much larger than the deviation costs no digits.

Bytes of `bn_stats`: y read once, 12 * T * C written, T at most 528 * 64 / C; about 4 FLOPs per element, so 2 FLOPs
per byte in bfloat16 where the A100's ridge is 156 (312 TFLOP/s over 2.0 TB/s) and the H100's 295 (989 over 3.35):
bound by bandwidth. y of (256, 64, 56, 56) in bfloat16: 103 MB, modelled 51 us and 31 us. A merge reads 12 * T * C
bytes for about 10 FLOPs per partial, less than 1 FLOP per byte. Accumulates in float32. A set of rows with an
infinite mean merges to NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import merge_statistics, product, tile_statistics
from .launch import Moved, launch
from .reduce import DIRECT_ROWS, GROUP_ROWS, RowTiles, channels_last, row_tile, rows_of

# The tile of partials that one step of a merge reads.
MERGE_TILE = {"BLOCK_T": 128, "BLOCK_C": 16, "num_warps": 8}


@triton.jit
def _bn_stats_kernel(
    y_ptr,  # (rows, C)
    partials_ptr,  # (programs, 3, C) float32
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

    # Measured from the program's first row: the difference of two values of one channel is exact enough, and the
    # mean of differences keeps digits that a mean much larger than the deviation would lose.
    first = program.to(tl.int64) * BLOCK_ROWS
    origin = tl.load(y_ptr + first * C + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)

    count, mean, m2 = 0.0, tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, rows, programs * BLOCK_ROWS):
        offs, mask, mask_rows = row_tile(start, rows, offs_c, C, BLOCK_ROWS)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tile_count, tile_mean, tile_m2 = tile_statistics(y - origin[None, :], mask_rows)
        count, mean, m2 = merge_statistics(count, mean, m2, tile_count, tile_mean, tile_m2)

    out_ptr = partials_ptr + program.to(tl.int64) * 3 * C + offs_c
    tl.store(out_ptr, tl.zeros((BLOCK_C,), tl.float32) + count, mask=offs_c < C)
    tl.store(out_ptr + C, origin + mean, mask=offs_c < C)
    tl.store(out_ptr + 2 * C, m2, mask=offs_c < C)


@triton.jit
def merge_rows(partials_ptr, first, last, offs_c, C, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """``(count, mean, M2)``, each ``(BLOCK_C,)``, of the partials ``first`` (int64) to ``last``, exclusive."""
    count, mean = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask = (offs_t[:, None] < last) & (offs_c[None, :] < C)
        tile_ptr = partials_ptr + offs_t[:, None] * 3 * C + offs_c[None, :]
        n = tl.load(tile_ptr, mask=mask, other=0.0)
        m = tl.load(tile_ptr + C, mask=mask, other=0.0)
        s = tl.load(tile_ptr + 2 * C, mask=mask, other=0.0)
        # Chan's formula for many sets at once, in sums alone. A reduction by the formula for two would not be
        # repeatable: it rounds differently with its operands swapped, as lanes that exchange theirs swap them.
        tile_count = tl.sum(n, 0)
        tile_mean = tl.sum(product(n, m), 0) / tl.maximum(tile_count, 1.0)
        deviation = tl.where(n > 0, m - tile_mean[None, :], 0.0)
        tile_m2 = tl.sum(s + product(n, deviation * deviation), 0)
        count, mean, m2 = merge_statistics(count, mean, m2, tile_count, tile_mean, tile_m2)
    return count, mean, m2


@triton.jit
def _merge_partials_kernel(
    partials_ptr,  # (T, 3, C) float32
    out_ptr,  # (groups, 3, C) float32
    T,
    C,
    group_rows,  # rows of partials per group
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks_c = tl.cdiv(C, BLOCK_C)
    group = (tl.program_id(0) // blocks_c).to(tl.int64)
    offs_c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)

    last = tl.minimum((group + 1) * group_rows, T)
    count, mean, m2 = merge_rows(partials_ptr, group * group_rows, last, offs_c, C, BLOCK_T, BLOCK_C)

    tl.store(out_ptr + group * 3 * C + offs_c, count, mask=offs_c < C)
    tl.store(out_ptr + group * 3 * C + C + offs_c, mean, mask=offs_c < C)
    tl.store(out_ptr + group * 3 * C + 2 * C + offs_c, m2, mask=offs_c < C)


def bn_stats(y: Tensor) -> Tensor:
    """Partial statistics ``(T, 3, C)`` of ``y`` ``(N, C, H, W)``, T fixed by its shape. See `reference.bn_stats`."""
    y = channels_last(y)
    tiles = RowTiles(rows_of(y), y.shape[1], elements=4096)
    if not tiles.reducers:
        return y.new_zeros((1, 3, y.shape[1]), dtype=torch.float32)
    partials = y.new_empty((tiles.reducers, 3, y.shape[1]), dtype=torch.float32)
    launch(
        _bn_stats_kernel,
        tiles.reducing_grid,
        Moved(activations=((y,), ()), partials=((), (partials,))),
        {"y_ptr": y, "partials_ptr": partials, "rows": tiles.rows, "C": tiles.channels},
        tiles.config,
    )
    return partials


def merge_down_to(partials: Tensor, most: int) -> Tensor:
    """``partials`` ``(T, 3, C)`` merged, stage by stage, until there are at most ``most``."""
    while (rows := partials.shape[0]) > most:
        groups = triton.cdiv(rows, GROUP_ROWS) if rows > DIRECT_ROWS else 1
        c = partials.shape[2]
        out = partials.new_empty((groups, 3, c))
        launch(
            _merge_partials_kernel,
            (groups * triton.cdiv(c, MERGE_TILE["BLOCK_C"]),),
            Moved(partials=((partials,), (out,))),
            {
                "partials_ptr": partials,
                "out_ptr": out,
                "T": rows,
                "C": c,
                "group_rows": GROUP_ROWS if groups > 1 else rows,
            },
            MERGE_TILE,
        )
        partials = out
    return partials


def merge_partials(partials: Tensor) -> Tensor:
    """``(T, 3, C)`` float32 partials merged into ``(1, 3, C)``; zeros where T is 0. See `reference.merge_partials`."""
    partials = partials.contiguous()
    return merge_down_to(partials, 1) if partials.shape[0] else partials.new_zeros((1, *partials.shape[1:]))
