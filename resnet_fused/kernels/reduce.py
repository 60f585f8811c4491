"""Rows in tiles, and the ordered sum over partial results.

    sum_rows    out[x] = sum over t of partials[t, x]      (T, X) float32 -> (X,) float32

An activation is ``(rows, C)`` in memory, rows = N * H * W. A kernel that reduces over rows runs a fixed number
of programs, each over its own tiles in order, and writes one partial result per program; summing those in a
fixed order, in two stages where there are many, makes every sum bitwise repeatable without atomics.

Bytes of `sum_rows`: 4 * T * X read, 4 * X written (a first stage, above `DIRECT_ROWS`, adds 2 * 4 * X * T / 128);
FLOPs T * X; 0.25 FLOP per byte, so bound by bandwidth: at T = 528 and X = 128, 270 KB, modelled 0.14 us of
A100's 2.0 TB/s and 0.08 us of H100's 3.35 TB/s, below the cost of a launch. Accumulates in float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Moved, launch

# Programs of a kernel that reduces over rows: four for each of an H100's 132 multiprocessors. A constant, not a
# property of the device, so that results are the same on every device.
PROGRAMS = 528
# Partial results that one program sums or merges; more than that go through stages of GROUP_ROWS each.
DIRECT_ROWS = 1024
GROUP_ROWS = 128


@triton.jit
def row_tile(start, rows, offs_c, C, BLOCK_ROWS: tl.constexpr):
    """``(offs, mask)``, ``(BLOCK_ROWS, BLOCK_C)``, and ``mask_rows``, ``(BLOCK_ROWS, 1)``; ``start`` is int64."""
    offs_rows = start + tl.arange(0, BLOCK_ROWS)
    mask_rows = offs_rows[:, None] < rows
    offs = offs_rows[:, None] * C + offs_c[None, :]
    return offs, mask_rows & (offs_c[None, :] < C), mask_rows


@triton.jit
def store_sums(partials_ptr, program, sum_g, sum_g_xhat, offs_c, C):
    """Write one program's ``(2, C)`` partial sums from accumulators ``(BLOCK_ROWS, BLOCK_C)``."""
    out_ptr = partials_ptr + program.to(tl.int64) * 2 * C + offs_c
    tl.store(out_ptr, tl.sum(sum_g, 0), mask=offs_c < C)
    tl.store(out_ptr + C, tl.sum(sum_g_xhat, 0), mask=offs_c < C)


@triton.jit
def _sum_rows_kernel(
    partials_ptr,  # (T, X) float32
    out_ptr,  # (groups, X) float32
    T,
    X,
    group_rows,  # rows of partials per group
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    blocks_x = tl.cdiv(X, BLOCK_X)
    group = (tl.program_id(0) // blocks_x).to(tl.int64)
    offs_x = (tl.program_id(0) % blocks_x) * BLOCK_X + tl.arange(0, BLOCK_X)
    mask_x = offs_x < X
    last = tl.minimum((group + 1) * group_rows, T)

    acc = tl.zeros((BLOCK_T, BLOCK_X), tl.float32)
    for start in range(group * group_rows, last, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        mask = (offs_t[:, None] < last) & mask_x[None, :]
        acc += tl.load(partials_ptr + offs_t[:, None] * X + offs_x[None, :], mask=mask, other=0.0)

    tl.store(out_ptr + group * X + offs_x, tl.sum(acc, 0), mask=mask_x)


@dataclasses.dataclass(frozen=True)
class RowTiles:
    """How ``(rows, C)`` elements are cut into tiles of ``elements``; a tile's row is up to 64 channels."""

    rows: int
    channels: int
    elements: int = 2048

    @property
    def block_c(self) -> int:
        """Channels of a tile, a power of two: at 64, a row of bfloat16 is one cache line of 128 bytes."""
        return min(64, triton.next_power_of_2(self.channels))

    @property
    def block_rows(self) -> int:
        """Rows of a tile, a power of two."""
        return self.elements // self.block_c

    @property
    def channel_blocks(self) -> int:
        """Tiles side by side."""
        return triton.cdiv(self.channels, self.block_c)

    @property
    def reducers(self) -> int:
        """Programs per channel block of a kernel that reduces over rows; 0 where there are none."""
        return min(triton.cdiv(self.rows, self.block_rows), max(1, PROGRAMS // self.channel_blocks))

    @property
    def grid(self) -> tuple[int]:
        """One program per tile."""
        return (triton.cdiv(self.rows, self.block_rows) * self.channel_blocks,)

    @property
    def reducing_grid(self) -> tuple[int]:
        """`reducers` programs per channel block."""
        return (self.reducers * self.channel_blocks,)

    @property
    def config(self) -> dict[str, Any]:
        """The compile-time arguments.

        ``ALIGN_C`` divides C. A kernel that writes ``C // ALIGN_C * ALIGN_C`` for C tells the compiler so, and gets
        accesses of 128 bits: by itself Triton knows no divisor of an argument but 16.
        """
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_C": self.block_c,
            "ALIGN_C": math.gcd(self.channels, 16),
            "num_warps": 4,
        }


def rows_of(t: Tensor) -> int:
    """N * H * W of an activation ``(N, C, H, W)``."""
    n, _, h, w = t.shape
    return n * h * w


def channels_last(t: Tensor) -> Tensor:
    """``t`` ``(N, C, H, W)`` with its rows contiguous in memory; a copy unless they are."""
    return t.contiguous(memory_format=torch.channels_last)


def sum_rows(partials: Tensor) -> Tensor:
    """The sum over the first axis of ``partials`` ``(T, ...)`` float32, in a fixed order; zeros where T is 0.

    Where T is 1 the result is a view of ``partials``.

    Equivalent to: ``partials.sum(0)``
    """
    partials = partials.contiguous()
    shape, x = partials.shape[1:], math.prod(partials.shape[1:])
    while (rows := partials.shape[0]) != 1:
        groups = triton.cdiv(rows, GROUP_ROWS) if rows > DIRECT_ROWS else 1
        if rows == 0:
            return partials.new_zeros(shape)
        block_t = min(GROUP_ROWS, triton.next_power_of_2(rows))
        block_x = min(2048 // block_t, triton.next_power_of_2(max(x, 1)))
        out = partials.new_empty((groups, *shape))
        launch(
            _sum_rows_kernel,
            (groups * triton.cdiv(x, block_x),),
            Moved(partials=((partials,), (out,))),
            {
                "partials_ptr": partials,
                "out_ptr": out,
                "T": rows,
                "X": x,
                "group_rows": GROUP_ROWS if groups > 1 else rows,
            },
            {"BLOCK_T": block_t, "BLOCK_X": block_x, "num_warps": 4},
        )
        partials = out
    return partials[0]
