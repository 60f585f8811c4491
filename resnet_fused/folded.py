"""Convolutions with their batch norm folded into filters and bias, kept beside the parameters, never instead of them.

A `Folded` in a block's ``__dict__`` is the permission to keep them, given by `resnet_fused.fold`. They are made at
the first call, in float64, rounded once to the dtype the convolution runs in, and made again when a parameter or
buffer they come from was written to, replaced or moved, and after every step of any optimizer: fused ones leave the
version counters alone. Counter, address, some of the elements and what is static about the site are compared at every
call. What has no version counter, an inference tensor, is folded anew at every call.

On a CPU the add and the ReLU are post-operations of oneDNN's convolution, over filters in its own layout. Its ReLU
gives 0 for NaN, torch's NaN. So a bound on the size of everything inside a block is carried along: where nothing can
overflow from a finite input there is no NaN, and where the bound does not say so the ReLU is torch's.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.optim.optimizer import register_optimizer_step_post_hook

from .calls import SiteCall, SiteParams
from .links import Link, child, conv_padding
from .spec import SiteSpec

FOLDED = "_resnet_fused_folded"
BY_FOLD = "_resnet_fused_by_fold"  # on every object whose class `fold` itself changed


class FoldedSite(NamedTuple):
    """A convolution with everything in it.

    ``weight`` is in oneDNN's layout where ``packed``. For an input of at most m in size, the output has at most
    ``gain * m + shift``.
    """

    weight: Tensor
    bias: Tensor
    packed: bool
    gain: float
    shift: float


class Folded:
    """The folded convolutions of one block; a copy of it, and a pickled one, starts empty."""

    def __init__(self) -> None:
        _watch_optimizers()
        self._sites: dict[tuple[str, torch.dtype], tuple[tuple[Any, ...], tuple[_Stamp | None, ...], FoldedSite]] = {}

    def __reduce__(self) -> Any:
        return Folded, ()

    def site(self, name: str, call: SiteCall, params: SiteParams, x: Tensor) -> FoldedSite:
        """The convolution called ``name``, as its parameters are now, for inputs like ``x``."""
        sources = (*params[:6],)
        static = (call.stride, call.padding, call.dilation, call.groups, call.eps, onednn(x), _steps)
        kept = self._sites.get((name, x.dtype))
        if kept is not None and kept[0] == static and all(map(_is_unchanged, kept[1], sources)):
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():  # kept for later calls in any mode
            made = _fold(call, params, x)
            stamps = tuple(None if t is None else _Stamp.of(t) for t in sources)
        self._sites[name, x.dtype] = (static, stamps, made)
        return made


_steps = 0  # of all optimizers, since the first `Folded` was made


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


class _Stamp(NamedTuple):
    """What a tensor was when it was folded. Its storage is kept, so that no other tensor gets its address."""

    storage: torch.UntypedStorage
    address: int
    version: int | None
    sample: Tensor

    @staticmethod
    def of(t: Tensor) -> _Stamp:
        version = None if t.is_inference() else t._version
        return _Stamp(t.untyped_storage(), t.data_ptr(), version, _sample(t).clone())


def _sample(t: Tensor) -> Tensor:
    """Up to about 64 elements, as they lie in memory."""
    step = max(1, t.numel() // 64)
    try:
        return t.detach().as_strided((t.numel() // step,), (step,))
    except RuntimeError:  # an expanded tensor has less memory than elements
        return t.detach().flatten()[::step]


def _is_unchanged(stamp: _Stamp | None, t: Tensor | None) -> bool:
    if stamp is None or t is None:
        return stamp is t
    if t.is_inference() or stamp.version != t._version or stamp.address != t.data_ptr():
        return False
    return torch.equal(_sample(t), stamp.sample)


def onednn(x: Tensor) -> bool:
    """Whether oneDNN's convolutions with post-operations take ``x``."""
    if x.device.type != "cpu" or not x.numel() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return x.dtype == torch.float32 or (
        x.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _fold(call: SiteCall, params: SiteParams, x: Tensor) -> FoldedSite:
    weight, conv_bias, gamma, beta, mean, var = params[:6]
    wide, shift = weight.double(), weight.new_zeros(weight.shape[0], dtype=torch.float64)
    if conv_bias is not None:
        shift += conv_bias
    if mean is not None and var is not None:
        scale = (var.double() + call.eps).rsqrt()
        if gamma is not None:
            scale *= gamma
        wide = wide * scale.view(-1, 1, 1, 1)
        shift = (shift - mean) * scale
        if beta is not None:
            shift += beta
    filters = wide.to(x.dtype, memory_format=torch.channels_last)
    gain = filters.double().abs().sum((1, 2, 3)).max().item()
    packed = onednn(x)
    if packed:
        filters = torch.ops.mkldnn._reorder_convolution_weight(
            filters, call.padding, call.stride, call.dilation, call.groups, list(x.shape)
        )
    return FoldedSite(filters, shift.to(x.dtype), packed, gain, shift.abs().max().item())


def run(
    site: FoldedSite, call: SiteCall, x: Tensor, residual: Tensor | None, relu: bool, bounded: bool, owned: bool = False
) -> Tensor:
    """``act(conv(x) + residual)`` ``(N, K, P, Q)`` channels_last.

    Args:
        bounded: there is no NaN.  owned: ``residual`` is nobody else's, and may be overwritten.
    """
    geometry = (call.padding, call.stride, call.dilation, call.groups)
    if not site.packed:
        out = conv2d(x, site.weight, site.bias, call.stride, call.padding, call.dilation, call.groups)
        if residual is not None:
            out += residual
        return (out.relu_() if relu else out).contiguous(memory_format=torch.channels_last)
    ops, act = torch.ops.mkldnn, relu and bounded
    if residual is None:
        out = ops._convolution_pointwise(x, site.weight, site.bias, *geometry, "relu" if act else "none", [], "")
    else:
        after: tuple[Any, ...] = ("add", None, "relu" if act else None, [], None)
        if owned:
            out = ops._convolution_pointwise_.binary(residual, x, site.weight, site.bias, *geometry, *after)
        else:
            out = ops._convolution_pointwise.binary(x, residual, site.weight, site.bias, *geometry, *after)
    return out.relu_() if relu and not act else out


def plain_call(link: Link, site: SiteSpec, engine: str) -> tuple[SiteCall, SiteParams]:
    """A convolution without batch norm as a site."""
    conv = child(link.block, site.conv)
    call = SiteCall(engine, conv.stride, conv_padding(conv), conv.dilation, conv.groups, False, False, 0.0, 0.0)
    return call, SiteParams(conv.weight, conv.bias, None, None, None, None, None)


def largest(x: Tensor) -> float:
    """The size of the largest element; NaN if there is one."""
    low, high = torch.aminmax(x.permute(0, 2, 3, 1))
    return max(-low.item(), high.item()) if low == low else float("nan")


def limit(dtype: torch.dtype) -> float:
    """Below it nothing overflows, whatever the order and the rounding of the sums."""
    return torch.finfo(dtype).max / 4
