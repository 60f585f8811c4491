"""Device functions that every kernel shares, so that forward, mask and backward agree to the bit.

    z = scale * (y - mean) + shift       an explicit fused multiply-add: the sign near zero is the same everywhere
    act = relu(z), a NaN passes          its mask is z <= 0, false for a NaN
    dy = a * g + b * (y - mean) + c      (a, b, c) per channel from the sums of g and g * xhat

``moments`` is ``(5, C)`` float32: mean, rstd, scale, shift, 1 / count. ``sums`` is ``(2, C)`` float32: sum g,
sum g * xhat. Tile statistics are (count, mean, M2) of the values as stored, merged by Chan's formula, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_affine(moments_ptr, offs_c, C, mask_c):
    """``(mean, scale, shift)`` of the channels ``offs_c``; zeros where ``mask_c`` is off."""
    mean = tl.load(moments_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(moments_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(moments_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    return mean, scale, shift


@triton.jit
def load_normaliser(moments_ptr, offs_c, C, mask_c):
    """``(mean, rstd)`` of the channels ``offs_c``; zeros where ``mask_c`` is off."""
    mean = tl.load(moments_ptr + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(moments_ptr + C + offs_c, mask=mask_c, other=0.0)
    return mean, rstd


@triton.jit
def affine(y, mean, scale, shift):
    """``z`` in float32; ``y`` and the per-channel vectors broadcast."""
    return tl.fma(scale, y.to(tl.float32) - mean, shift)


@triton.jit
def relu(z):
    """ReLU as torch's: a NaN passes."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def masked(g, z):
    """``g`` where ReLU let ``z`` pass, a NaN included."""
    return tl.where(z <= 0, 0.0, g)


@triton.jit
def pack_bits(alive, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Booleans ``(ROWS, CHANNELS)`` as bytes ``(ROWS, CHANNELS / 8)``, the first channel in the lowest bit."""
    bits = tl.reshape(alive.to(tl.int32), (ROWS, CHANNELS // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(bits, 2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of `pack_bits`, as 0 and 1."""
    bits = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (ROWS, CHANNELS))


@triton.jit
def load_coefficients(moments_ptr, sums_ptr, offs_c, C, mask_c):
    """``(a, b, c)`` of a batch norm in training: ``dy = a * g + b * (y - mean) + c``."""
    rstd = tl.load(moments_ptr + C + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(moments_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    inv = tl.load(moments_ptr + 4 * C + offs_c, mask=mask_c, other=0.0)
    sum_g = tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0)
    sum_g_xhat = tl.load(sums_ptr + C + offs_c, mask=mask_c, other=0.0)
    return scale, -scale * rstd * sum_g_xhat * inv, -scale * sum_g * inv


@triton.jit
def bn_dy(g, y, mean, a, b, c):
    """Batch norm's backward affine in float32; everything broadcasts."""
    return tl.fma(a, g.to(tl.float32), tl.fma(b, y.to(tl.float32) - mean, c))


@triton.jit
def product(a, b):
    """``a * b`` that the compiler will not contract into a later sum.

    In a reduction's butterfly each lane would contract its own product and round its partner's: lanes that hold
    the same sum would then differ in the last bit, and which of them is stored is undefined.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def tile_statistics(v, rows):
    """``(count, mean, M2)`` over the first axis of ``v`` (float32); ``rows``: which rows exist, ``(BLOCK, 1)``.

    At least one row must exist. ``count`` is a scalar, the others are per column.
    """
    count = tl.sum(rows.to(tl.float32))
    mean = tl.sum(tl.where(rows, v, 0.0), 0) / count
    deviation = tl.where(rows, v - mean[None, :], 0.0)
    return count, mean, tl.sum(product(deviation, deviation), 0)


@triton.jit
def merge_statistics(count, mean, m2, other_count, other_mean, other_m2):
    """Chan's merge of two sets of rows; an empty set changes nothing."""
    total = count + other_count
    share = tl.where(total > 0, other_count / tl.maximum(total, 1.0), 0.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * count * share
