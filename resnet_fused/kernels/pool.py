"""The stem's tail: batch norm's affine, ReLU and max pool in one pass, and its backward.

    pool_apply    out[n, p, q, c] = max over the window of v            v = act(z) rounded to y's dtype
    pool_bwd      g[n, h, w, c] = mask(sum of dout over the windows that v[n, h, w, c] wins); sums of g, as in bn_bwd

The first of equal values wins a window and the last NaN wins, as in torch; nothing but y tells which. The backward
gathers: a program walks down a strip of cells of stride x stride positions, aligned to the windows, finds the winners
of the windows that begin at a cell, keeps those of the rows above, and hands every position its share: no indices and
no atomics. y and g (N, C, H, W), out and dout (N, C, P, Q), channels_last; moments (5, C), sums (2, C) float32.

Bytes: apply reads y and writes out; bwd reads y and dout and writes g, each once; windows overlap in cache. FLOPs per
position of y at 3x3, stride 2: about 15 and 40, so at most 9 per byte in bfloat16; the ridge is 10 on an A100
(19.5 TFLOP/s of float32 over 2.0 TB/s) and 20 on an H100 (67 over 3.35), 156 and 295 by the tensor cores' 312 and 989:
bound by bandwidth. (256, 64, 112, 112) in bfloat16: apply 514 MB, modelled 257 us and 153 us; bwd 925 MB, 462 us and
276 us, but its sm_90 code has about 105 instructions per position, modelled 0.76 ms at four a cycle and 1.755 GHz.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Pair
from .blocks import affine, load_affine, load_normaliser, masked, relu
from .geometry import channels_last_empty
from .launch import Moved, launch
from .reduce import RowTiles, channels_last, row_tile, store_sums, sum_rows

# Cells of a strip, at least. Its first row of windows is found twice, by the strip above too.
STRIP = 16


@triton.jit
def _load_value(y_ptr, n, h, w, inside, offs_c, H, W, C, mean, scale, shift, RELU: tl.constexpr):
    """``act(z)`` at positions ``(n, h, w)``, each ``(BLOCK,)``, rounded to y's dtype, in float32."""
    offs = ((n * H + h) * W + w)[:, None] * C + offs_c[None, :]
    y = tl.load(y_ptr + offs, mask=inside, other=0.0)
    v = affine(y, mean[None, :], scale[None, :], shift[None, :])
    if RELU:
        v = relu(v)
    return v.to(y.dtype).to(tl.float32)


@triton.jit
def _window(
    y_ptr, n, h0, w0, mask, offs_c, H, W, C, mean, scale, shift, R: tl.constexpr, S: tl.constexpr, RELU: tl.constexpr
):
    """``(max, winner)`` of the R x S windows that begin at ``(n, h0, w0)``; ``winner`` is r * S + s, -1 if empty."""
    best = tl.full(mask.shape, float("-inf"), tl.float32)
    winner = tl.full(mask.shape, -1, tl.int32)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            h, w = h0 + r, w0 + s
            inside = mask & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            v = _load_value(y_ptr, n, h, w, inside, offs_c, H, W, C, mean, scale, shift, RELU)
            wins = (v > best) | (v != v)
            if not RELU:  # else nothing is -inf, and the first value wins by itself
                wins |= winner < 0
            best, winner = tl.where(wins & inside, v, best), tl.where(wins & inside, r * S + s, winner)
    return best, winner


@triton.jit
def _pool_apply_kernel(
    y_ptr,  # (N, C, H, W) channels_last
    moments_ptr,  # (5, C) float32
    out_ptr,  # (rows, C), rows = N * P * Q
    rows,
    C,
    H,
    W,
    P,
    Q,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN_C: tl.constexpr,
):
    C = C // ALIGN_C * ALIGN_C
    blocks_c = tl.cdiv(C, BLOCK_C)
    start = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_ROWS
    offs_c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs, mask, _ = row_tile(start, rows, offs_c, C, BLOCK_ROWS)
    offs_rows = start + tl.arange(0, BLOCK_ROWS)
    n, p, q = offs_rows // (P * Q), offs_rows // Q % P, offs_rows % Q
    mean, scale, shift = load_affine(moments_ptr, offs_c, C, offs_c < C)

    h0, w0 = p * STRIDE_H - PADDING_H, q * STRIDE_W - PADDING_W
    best, _ = _window(y_ptr, n, h0, w0, mask, offs_c, H, W, C, mean, scale, shift, R, S, RELU)

    tl.store(out_ptr + offs, best.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pool_bwd_kernel(
    dout_ptr,  # (N, C, P, Q) channels_last
    y_ptr,  # (N, C, H, W) channels_last
    moments_ptr,  # (5, C) float32
    g_ptr,  # (N, C, H, W) channels_last
    partials_ptr,  # (programs, 2, C) float32
    strips,  # N * SEGMENTS * CELLS_W
    C,
    H,
    W,
    P,
    Q,
    SEGMENTS,
    LENGTH,  # cells of a strip, one below the other
    CELLS_W,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
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
    mean, scale, shift = load_affine(moments_ptr, offs_c, C, offs_c < C)
    # The windows that reach into a cell begin at it, or up to BACK - 1 strides before it.
    BACK_H: tl.constexpr = (R + STRIDE_H - 1) // STRIDE_H
    BACK_W: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W

    sum_g, sum_g_xhat = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32), tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for start in range(program.to(tl.int64) * BLOCK_ROWS, strips, programs * BLOCK_ROWS):
        offs_strips = start + tl.arange(0, BLOCK_ROWS)
        n, j = offs_strips // (SEGMENTS * CELLS_W), offs_strips % CELLS_W
        top = offs_strips // CELLS_W % SEGMENTS * LENGTH
        mask_strips = (offs_strips[:, None] < strips) & (offs_c[None, :] < C)

        winners, douts = tl.tuple(()), tl.tuple(())
        for _slot in tl.static_range(BACK_H * BACK_W):
            winners = winners + (tl.full((BLOCK_ROWS, BLOCK_C), -1, tl.int32),)
            douts = douts + (tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32),)
        for step in range(0, LENGTH + BACK_H - 1):
            i = top + step - (BACK_H - 1)
            new_winners, new_douts = tl.tuple(()), tl.tuple(())
            for back_w in tl.static_range(BACK_W):
                q = j - back_w
                mask = mask_strips & ((i >= 0) & (i < P) & (q >= 0) & (q < Q))[:, None]
                h0, w0 = i * STRIDE_H - PADDING_H, q * STRIDE_W - PADDING_W
                _best, winner = _window(y_ptr, n, h0, w0, mask, offs_c, H, W, C, mean, scale, shift, R, S, RELU)
                offs = ((n * P + i) * Q + q)[:, None] * C + offs_c[None, :]
                dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                new_winners, new_douts = new_winners + (winner,), new_douts + (dout,)
            # Rows of windows, the newest first: those of the rows above stay from the steps before.
            winners = new_winners + winners[: (BACK_H - 1) * BACK_W]
            douts = new_douts + douts[: (BACK_H - 1) * BACK_W]

            mask_step = mask_strips & (step >= BACK_H - 1)
            for a in tl.static_range(STRIDE_H):
                for b in tl.static_range(STRIDE_W):
                    h, w = i * STRIDE_H - PADDING_H + a, j * STRIDE_W - PADDING_W + b
                    inside = mask_step & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                    offs = ((n * H + h) * W + w)[:, None] * C + offs_c[None, :]
                    y = tl.load(y_ptr + offs, mask=inside, other=0.0)
                    g = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
                    for back_h in tl.static_range(BACK_H):
                        for back_w in tl.static_range(BACK_W):
                            r, s = a + back_h * STRIDE_H, b + back_w * STRIDE_W
                            if r < R and s < S:
                                won = winners[back_h * BACK_W + back_w] == r * S + s
                                g += tl.where(won, douts[back_h * BACK_W + back_w], 0.0)
                    if RELU:
                        g = masked(g, affine(y, mean[None, :], scale[None, :], shift[None, :]))
                    stored = g.to(g_ptr.dtype.element_ty)
                    tl.store(g_ptr + offs, stored, mask=inside)
                    g = tl.where(inside, stored.to(tl.float32), 0.0)
                    sum_g += g
                    sum_g_xhat += tl.where(inside, g * ((y.to(tl.float32) - mean[None, :]) * rstd[None, :]), 0.0)

    store_sums(partials_ptr, program, sum_g, sum_g_xhat, offs_c, C)


def _pooled(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def _window_config(kernel: Pair, stride: Pair, padding: Pair) -> dict[str, int]:
    names = ("R", "S", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    return dict(zip(names, (*kernel, *stride, *padding)))


def pool_apply(y: Tensor, moments: Tensor, kernel: Pair, stride: Pair, padding: Pair, relu: bool) -> Tensor:
    """Max pool of ``act(z)``, ``(N, C, P, Q)`` channels_last, dtype of ``y``. See `reference.pool_apply`."""
    y = channels_last(y)
    n, c, *size = y.shape
    p, q = (_pooled(*along) for along in zip(size, kernel, stride, padding))
    out = channels_last_empty(y, n, c, p, q)
    tiles = RowTiles(n * p * q, c)
    # Rows and columns behind the last window are not read.
    h, w = ((o - 1) * s + k - pad for o, k, s, pad in zip((p, q), kernel, stride, padding))
    launch(
        _pool_apply_kernel,
        tiles.grid,
        Moved(activations=((y[:, :, :h, :w],), (out,)), partials=((moments[0], moments[2:4]), ())),
        {
            "y_ptr": y,
            "moments_ptr": moments,
            "out_ptr": out,
            "rows": tiles.rows,
            "C": c,
            "H": size[0],
            "W": size[1],
            "P": p,
            "Q": q,
        },
        {**_window_config(kernel, stride, padding), "RELU": relu, **tiles.config},
    )
    return out


def pool_bwd(
    dout: Tensor, y: Tensor, moments: Tensor, kernel: Pair, stride: Pair, padding: Pair, relu: bool
) -> tuple[Tensor, Tensor]:
    """``(g, sums)``, ``g`` ``(N, C, H, W)`` channels_last, dtype of ``y``. See `reference.pool_bwd`."""
    dout, y = channels_last(dout), channels_last(y)
    n, c, h, w = y.shape
    cells_h, cells_w = (triton.cdiv(d + pad, s) for d, s, pad in zip((h, w), stride, padding))
    segments = max(1, cells_h // STRIP)
    g = torch.empty_like(y, memory_format=torch.channels_last)
    tiles = RowTiles(n * segments * cells_w, c, elements=1024)
    # Eight elements a thread, four where they or the windows that each keeps would take too many registers.
    packed = y.element_size() == 2 and triton.cdiv(kernel[0], stride[0]) * triton.cdiv(kernel[1], stride[1]) <= 4
    partials = moments.new_empty((tiles.reducers, 2, c))
    launch(
        _pool_bwd_kernel,
        tiles.reducing_grid,
        Moved(activations=((dout, y), (g,)), partials=((moments[:4],), (partials,))),
        {
            "dout_ptr": dout,
            "y_ptr": y,
            "moments_ptr": moments,
            "g_ptr": g,
            "partials_ptr": partials,
            "strips": tiles.rows,
            "C": c,
            "H": h,
            "W": w,
            "P": dout.shape[2],
            "Q": dout.shape[3],
            "SEGMENTS": segments,
            "LENGTH": triton.cdiv(cells_h, segments),
            "CELLS_W": cells_w,
        },
        {**_window_config(kernel, stride, padding), "RELU": relu, **tiles.config, "num_warps": 4 if packed else 8},
    )
    return g, sum_rows(partials)
