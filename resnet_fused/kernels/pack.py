"""Packing: a weight into the kernels' layout and dtype, an image of few channels into one that loads 128 bits.

    pack_weight   (K, C, R, S), dtype of the parameter  ->  (K, R, S, C), dtype of the activations
    pack_mask     a ReLU's output (N, C, H, W)           ->  (N, H, W, C / 8) uint8, a bit per element
    pack_image    (N, C <= 4, H, W)  ->  (N, H + 2 pad, W', 4), zeros around and in the fourth channel

A row of S taps over 4 channels is then one run of contiguous elements, padded with zero weights to a power of
two: a 7x7 stem over 3 channels with stride 2 is a convolution with 7 taps and 32 channels, whose pixels start
every 8 elements, so that each load of the image is 128 bits wide and needs no mask. It costs 32 / 21 of the
FLOPs and one pass over the image: at 224 px in bf16 0.3 MB read, 0.43 MB written, of about 200 MB per step.
The kernels only move bytes and are bound by bandwidth (modelled).
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import pack_bits
from .geometry import PACKED_CHANNELS, Geometry, Pair, new_mask
from .launch import Moved, launch

_BLOCK = 1024


@triton.jit
def _pack_weight_kernel(
    w_ptr,  # (K, R, S, C) in memory where LAST, else (K, C, R, S)
    packed_ptr,  # (K, R, TAP_S, TAP_C)
    K: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    TAP_S: tl.constexpr,
    TAP_C: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K * R * TAP_S * TAP_C
    c = offs % TAP_C
    s = offs // TAP_C % TAP_S
    r = offs // (TAP_C * TAP_S) % R
    k = offs // (TAP_C * TAP_S * R)
    if LAST:
        source = ((k * R + r) * S + s) * C + c
    else:
        source = ((k * C + c) * R + r) * S + s
    w = tl.load(w_ptr + source, mask=mask & (c < C) & (s < S), other=0.0)
    tl.store(packed_ptr + offs, w.to(packed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pack_image_kernel(
    x_ptr,  # (N, H, W, C)
    packed_ptr,  # (N, HEIGHT, WIDTH, 4)
    PIXELS,  # N * HEIGHT * WIDTH
    H,
    W,
    HEIGHT,
    WIDTH,
    C: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    TAP_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_c = tl.arange(0, TAP_C)
    h = offs // WIDTH % HEIGHT - PAD_H
    w = offs % WIDTH - PAD_W
    n = offs // WIDTH // HEIGHT
    inside = (offs < PIXELS) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    source = ((n * H + h) * W + w).to(tl.int64)[:, None] * C + offs_c[None, :]
    x = tl.load(x_ptr + source, mask=inside[:, None] & (offs_c[None, :] < C), other=0.0)
    target = offs.to(tl.int64)[:, None] * TAP_C + offs_c[None, :]
    tl.store(packed_ptr + target, x, mask=(offs < PIXELS)[:, None])


@triton.jit
def _pack_mask_kernel(
    x_ptr,  # (N, H, W, C)
    mask_ptr,  # (N, H, W, C / 8) uint8
    BYTES,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_x = offs[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + offs_x, mask=(offs < BYTES)[:, None], other=0.0).to(tl.float32)
    bits = pack_bits((x <= 0) == 0, BLOCK, 8)
    tl.store(mask_ptr + offs[:, None], bits, mask=(offs < BYTES)[:, None])


def pack_mask(x: Tensor) -> Tensor | None:
    """Where a ReLU's output ``x`` (N, C, H, W) channels_last passed, a NaN included, as `geometry.new_mask`'s bits.

    Equivalent to: ``~(x <= 0)``, packed along the channels
    """
    mask = new_mask(x)
    if mask is not None:
        launch(
            _pack_mask_kernel,
            (triton.cdiv(mask.numel(), _BLOCK // 8),),
            Moved(((x,), (mask,))),
            {"x_ptr": x, "mask_ptr": mask, "BYTES": mask.numel()},
            {"BLOCK": _BLOCK // 8, "num_warps": 4},
        )
    return mask


def pack_weight(weight: Tensor, dtype: torch.dtype, taps: Pair | None = None) -> Tensor:
    """``weight`` (K, C, R, S) as (K, R, S, C) in ``dtype``; nothing moves where it is that already.

    Args:
        taps: of an image, ``(TAP_S, TAP_C)`` as `pack_image` has them: the result is (K, R, 1, TAP_S * TAP_C).

    Equivalent to: ``weight.permute(0, 2, 3, 1).to(dtype)``, zero-padded to the taps
    """
    k, c, r, s = weight.shape
    last = weight.permute(0, 2, 3, 1)
    if taps is None and weight.dtype == dtype and last.is_contiguous():
        return last
    if not last.is_contiguous():
        weight = weight.contiguous()
    tap_s, tap_c = taps or (s, c)
    packed = weight.new_empty((k, r, s, c) if taps is None else (k, r, 1, tap_s * tap_c), dtype=dtype)
    launch(
        _pack_weight_kernel,
        (triton.cdiv(packed.numel(), _BLOCK),),
        Moved(weights=((weight,), (packed,))),
        {"w_ptr": weight, "packed_ptr": packed},
        {
            "K": k,
            "C": c,
            "R": r,
            "S": s,
            "TAP_S": tap_s,
            "TAP_C": tap_c,
            "LAST": last.is_contiguous(),
            "BLOCK": _BLOCK,
            "num_warps": 4,
        },
    )
    return packed


def packs_image(geometry: Geometry) -> bool:
    """Whether the input is an image to be packed: few channels, and taps side by side."""
    return geometry.c <= PACKED_CHANNELS and geometry.dilation == (1, 1)


def packed_geometry(geometry: Geometry) -> tuple[Geometry, Pair]:
    """The convolution over the packed image, and its taps ``(TAP_S, TAP_C)``."""
    tap_s = max(triton.next_power_of_2(geometry.s), 16 // PACKED_CHANNELS)
    stride = geometry.stride[1]
    row = triton.cdiv((geometry.q - 1) * stride + tap_s, stride)
    height = max((geometry.p - 1) * geometry.stride[0] + geometry.r, 1)
    packed = dataclasses.replace(
        geometry,
        h=height,
        w=geometry.q,
        c=tap_s * PACKED_CHANNELS,
        s=1,
        stride=(geometry.stride[0], 1),
        padding=(0, 0),
        pixel=stride * PACKED_CHANNELS,
        row=row,
        image=height * row * stride * PACKED_CHANNELS,
    )
    return packed, (tap_s, PACKED_CHANNELS)


def pack_image(x: Tensor, geometry: Geometry) -> Tensor:
    """``x`` (N, C, H, W) channels_last as (N, 4, H', W') channels_last for `packed_geometry`.

    Equivalent to: ``F.pad(x, (pad, ..., pad, ..., 0, 4 - C))``, cut or padded to the windows that are read
    """
    packed, (_, channels) = packed_geometry(geometry)
    height, width = packed.h, packed.row * geometry.stride[1]
    out = x.new_empty_strided(
        (geometry.n, channels, height, width), (height * width * channels, 1, width * channels, channels)
    )
    launch(
        _pack_image_kernel,
        (triton.cdiv(geometry.n * height * width, _BLOCK // channels),),
        Moved(((x,), (out,))),
        {
            "x_ptr": x,
            "packed_ptr": out,
            "PIXELS": geometry.n * height * width,
            "H": geometry.h,
            "W": geometry.w,
            "HEIGHT": height,
            "WIDTH": width,
        },
        {
            "C": geometry.c,
            "PAD_H": geometry.padding[0],
            "PAD_W": geometry.padding[1],
            "TAP_C": channels,
            "BLOCK": _BLOCK // channels,
            "num_warps": 4,
        },
    )
    return out
