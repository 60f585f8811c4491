"""bfloat16 and tf32 in numpy, which has neither."""

from __future__ import annotations

import numpy as np

BFLOAT16_NAN = 0x7FC0


def round_to_bfloat16(x: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """The bit patterns (uint16) of float32 ``x`` rounded to bfloat16, to nearest even unless ``toward_zero``."""
    x = np.asarray(x, dtype=np.float32)
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)
    if toward_zero:
        return (bits >> 16).astype(np.uint16)
    nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), BFLOAT16_NAN, nearest).astype(np.uint16)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """Float32 ``x`` rounded to tf32 to nearest, ties away from zero, as the tensor cores' operands are."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32).reshape(x.shape)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
