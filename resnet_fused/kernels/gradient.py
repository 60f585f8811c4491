"""The gradient that enters a convolution's backward: batch norm's backward affine, applied while loading."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .blocks import affine, bn_dy, load_affine, load_coefficients, masked


class Gradient(NamedTuple):
    """The gradient that enters a site: ``dy`` itself, or what it is made of.

    ``g``: (N, K, P, Q). With ``moments`` (5, K), ``dy`` is batch norm's backward of ``g``: with ``sums`` (2, K) of
    batch statistics (then ``y`` (N, K, P, Q) is read), without of running statistics (``y`` only for the mask).
    ``relu``: ``g`` may be the gradient of ``act(z)``, so the site's own mask is applied; twice changes nothing.
    """

    g: Tensor
    y: Tensor | None = None
    moments: Tensor | None = None
    sums: Tensor | None = None
    relu: bool = False

    def constants(self) -> dict[str, int | bool]:
        """The kernels' compile-time arguments."""
        norm = 0 if self.moments is None else 2 if self.sums is None else 1
        return {"NORM": norm, "MASK": self.relu and norm > 0}

    @property
    def reads(self) -> tuple[Tensor | None, ...]:
        """The activations a kernel reads for it."""
        return (self.g, self.y if self.sums is not None or self.relu else None)


@triton.jit
def load_dy(g_ptr, y_ptr, offs, mask, moments, NORM: tl.constexpr, MASK: tl.constexpr):
    """A tile of ``dy``, zero where ``mask`` is off, in the dtype of ``g``; ``moments`` as `load_norm` gives them."""
    g = tl.load(g_ptr + offs, mask=mask, other=0.0)
    if NORM > 0:
        mean, scale, shift, a, b, c = moments
        dy = g.to(tl.float32)
        if NORM == 1 or MASK:
            y = tl.load(y_ptr + offs, mask=mask, other=0.0)
            if MASK:
                dy = masked(dy, affine(y, mean[None, :], scale[None, :], shift[None, :]))
        if NORM == 1:
            dy = bn_dy(dy, y, mean[None, :], a[None, :], b[None, :], c[None, :])
        else:
            dy = a[None, :] * dy
        g = tl.where(mask, dy, 0.0).to(g.dtype)
    return g


@triton.jit
def load_norm(moments_ptr, sums_ptr, offs_k, K, mask_k, NORM: tl.constexpr):
    """The per-channel vectors `load_dy` needs: mean, scale, shift, a, b, c."""
    mean, scale, shift = load_affine(moments_ptr, offs_k, K, mask_k)
    if NORM == 1:
        a, b, c = load_coefficients(moments_ptr, sums_ptr, offs_k, K, mask_k)
    else:
        a, b, c = scale, scale, scale
    return mean, scale, shift, a, b, c
