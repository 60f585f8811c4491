"""The static shape of a convolution as the kernels see it, and what they do while loading its input."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]
PACKED_CHANNELS = 4  # of an image packed by `stem.pack_image`


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution of ``(N, C, H, W)`` channels_last into ``(N, K, P, Q)``.

    ``pixel`` is the distance in elements from one pixel of a row to the next, ``row`` the distance in these pixels
    from one row to the next, ``image`` the distance in elements from one image to the next: C, W and H * W * C, but
    for a view that steps over pixels and for an image packed by `pack.pack_image`.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    p: int
    q: int
    r: int
    s: int
    stride: Pair
    padding: Pair
    dilation: Pair
    pixel: int
    row: int
    image: int

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
        """That of ``F.conv2d(x, weight, None, stride, padding, dilation)``."""
        (n, c, h, w), (k, _, r, s) = x.shape, weight.shape
        p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
        q = (w + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
        pairs = (tuple(stride), tuple(padding), tuple(dilation))
        pixel, row, image = c, w, h * w * c
        if not x.is_contiguous(memory_format=torch.channels_last):
            pixel, row, image = x.stride(3), x.stride(2) // x.stride(3), x.stride(0)
        return cls(n, h, w, c, k, p, q, r, s, *pairs, pixel, row, image)  # type: ignore[arg-type]

    @property
    def npq(self) -> int:
        """Rows of the output."""
        return self.n * self.p * self.q

    @property
    def flops(self) -> int:
        """Of its forward, as of its dgrad and its wgrad: a multiply-add is two."""
        return 2 * self.npq * self.k * self.c * self.r * self.s

    @property
    def addressable(self) -> bool:
        """Whether pixels can be numbered in 32 bits; addresses have 64."""
        return max(self.n * self.h * self.row, self.npq, self.image) < 2**31 - 2**16

    @property
    def pointwise(self) -> bool:
        """Whether each output pixel reads one input pixel."""
        return self.r == self.s == 1 and self.padding == (0, 0)

    @property
    def owns_every_pixel(self) -> bool:
        """Whether every input pixel is read by one tap that owns it, so that a join may store while loading."""
        sides = zip(self.stride, self.padding, (self.r, self.s), (self.p, self.q), (self.h, self.w), strict=True)
        covered = all(taps >= pad + stride and out * stride >= size for stride, pad, taps, out, size in sides)
        return covered and self.dilation == (1, 1)

    def constants(self) -> dict[str, int]:
        """The kernels' compile-time arguments."""
        names = (("C", self.c), ("K", self.k), ("R", self.r), ("S", self.s), ("PIXEL", self.pixel))
        pairs = (("STRIDE", self.stride), ("PAD", self.padding), ("DIL", self.dilation))
        return {**dict(names), **{f"{name}_{axis}": pair[i] for name, pair in pairs for i, axis in enumerate("HW")}}

    def touched(self, x: Tensor) -> Tensor:
        """The part of ``x`` that the convolution reads: a strided view where it steps over pixels."""
        if self.r == self.s == 1 and self.padding == (0, 0):
            return x[:, :, :: self.stride[0], :: self.stride[1]]
        return x


class Prologue(NamedTuple):
    """What a kernel does to the input while loading it.

    ``kind``: plain | pending (``act(z)``) | join (``act(z + shortcut)``). ``moments`` ``(5, C)`` float32;
    ``residual`` like the input, with ``residual_moments`` ``(5, C)`` where it is a projection's raw output. ``mask``:
    where a join writes the ReLU's mask, a bit per channel, `new_mask` or None.
    """

    kind: str = "plain"
    moments: Tensor | None = None
    relu: bool = True
    residual: Tensor | None = None
    residual_moments: Tensor | None = None
    mask: Tensor | None = None

    def constants(self) -> dict[str, int | bool]:
        """The forward kernel's compile-time arguments."""
        shortcut = 0 if self.residual is None else 1 if self.residual_moments is None else 2
        kinds = {"plain": 0, "pending": 1, "join": 2}
        return {
            "SOURCE": kinds[self.kind],
            "SOURCE_RELU": self.relu,
            "SHORTCUT": shortcut,
            "BITS": self.mask is not None,
        }


PLAIN = Prologue()


def precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s input precision: fp32 honours torch's TF32 switch for convolutions, however it was set.

    Triton hands float32 operands to a tensor core as they are, and it drops their lower 13 bits: TF32 truncates here.
    ``torch.backends.cudnn.allow_tf32`` itself raises where the two interfaces of the switch were mixed.
    """
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


def loadable(x: Tensor) -> Tensor:
    """``x`` itself where kernels can load it, channels_last or a view that steps over its pixels; else a copy."""
    stepped = x.stride(1) == 1 and x.stride(3) >= x.shape[1] and x.stride(2) % max(x.stride(3), 1) == 0
    return x if stepped else x.contiguous(memory_format=torch.channels_last)


def new_mask(x: Tensor) -> Tensor | None:
    """An uninitialised ``(N, H, W, C / 8)`` uint8 mask of ``x`` (N, C, H, W); None where C is no multiple of 8."""
    n, c, h, w = x.shape
    return None if c % 8 else x.new_empty((n, h, w, c // 8), dtype=torch.uint8)


def channels_last_empty(x: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """An uninitialised ``(n, c, h, w)`` channels_last tensor, dtype and device of ``x``."""
    return x.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))
