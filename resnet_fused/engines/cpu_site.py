"""A whole site on the CPU in one op: the primitives around PyTorch's convolution, without a call for each of them.

What the ops do, in which order, is `engines.library`, their specification: results differ from it by rounding where a
small float32 or float64 convolution runs as one matrix product, and not at all elsewhere. What an op refuses, and a
library built before the ops existed, goes to `engines.library` too, whose error then names what is wrong in torch's own
words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..calls import SiteCall, SiteGrads, SiteOutputs, SiteParams, Source
from ..reference import opmath
from . import library
from .cpu_plan import OWN_NONE, packed

# Each op's overload, bound once by `register`; None without it.
_site_fwd: Callable[..., Any] | None = None
_site_infer: Callable[..., Any] | None = None
_site_rebuild: Callable[..., Any] | None = None
_site_bwd: Callable[..., Any] | None = None
_pad_bwd: Callable[..., Any] | None = None


def site_forward(engine: ModuleType, call: SiteCall, source: Source, params: SiteParams) -> SiteOutputs:
    """``x`` is a join's, else None or the source's. See `resnet_fused.site.site_forward`."""
    if _site_fwd is not None:
        kind, src, moments, relu, skip, residual, residual_moments = source
        _, stride, padding, dilation, groups, _, training, momentum, eps, _, _, _ = call
        join = kind == "join"
        try:
            y, made, carrier, x = _site_fwd(
                src, moments, residual, residual_moments, skip.stride, skip.channel_offset, relu, join, *params,
                *stride, *padding, *dilation, groups, training, momentum, eps, packed(call, src, params.weight),
            )  # fmt: skip
        except RuntimeError:
            return library.site_forward(engine, call, source, params)
        return SiteOutputs(y, made, x if join else None, None, carrier)
    return library.site_forward(engine, call, source, params)


def site_infer(call: SiteCall, x: Tensor, params: SiteParams, residual: Tensor | None, relu: bool) -> Tensor:
    """``act(bn(conv(x)) + residual)`` with running statistics, in one pass over the convolution's output, in place.

    Args:
        x: ``(N, C, H, W)`` channels_last.  residual: ``(N, K, P, Q)`` in the dtype of ``x``.

    Equivalent to: `library.site_conv`, then `reference.bn_apply` with `library.eval_moments`.
    """
    assert _site_infer is not None
    geometry = (*call.stride, *call.padding, *call.dilation, call.groups)
    try:
        return _site_infer(x, residual, *params[:6], *geometry, call.eps, relu, packed(call, x, params.weight))
    except RuntimeError:
        engine = sys.modules["resnet_fused.engines.cpu"]
        y = library.site_conv(engine, call, x, params.weight)
        return engine.bn_apply(y, library.eval_moments(engine, call, params, y.dtype), residual, None, 1, 0, relu)


def folds_itself(call: SiteCall, x: Tensor, params: SiteParams) -> bool:
    """Whether `site_infer` applies the batch norm while it stores its own products, at no cost."""
    return packed(call, x, params.weight) != OWN_NONE


def site_rebuild(engine: ModuleType, call: SiteCall, source: Source, weight: Tensor) -> Tensor:
    """``y`` again. See `resnet_fused.site.site_rebuild`."""
    if _site_rebuild is None:
        return library.site_rebuild(engine, call, source, weight)
    skip = source.skip
    return _site_rebuild(
        source.y, source.moments, source.residual, source.residual_moments, skip.stride, skip.channel_offset,
        source.relu, weight, *call.stride, *call.padding, *call.dilation, call.groups,
        packed(call, source.y, weight),
    )  # fmt: skip


def site_backward(
    engine: ModuleType,
    call: SiteCall,
    source: Source,
    x: Tensor | None,
    params: Sequence[Tensor | None],
    y: Tensor,
    moments: Tensor,
    g: Tensor,
    sums: Tensor,
    dskip: Tensor | None,
    needs: tuple[bool, bool],
) -> SiteGrads:
    """Gradients of the first four of the `SiteParams` with the rest. See `resnet_fused.site.site_backward`."""
    kind, src, src_moments, relu, skip, residual, residual_moments = source
    weight = params[0]
    assert weight is not None
    bits = packed(call, src, weight)
    alone = kind == "join" and skip.kind == "none" and bits == OWN_NONE  # the op would mask what the library does not
    if _site_bwd is None or call.hand_stride > 1 or alone:
        return library.site_backward(engine, call, source, x, weight, y, moments, g, sums, dskip, needs)
    need_source, need_weight = needs
    dsrc, dsums, dresidual_sums, dweight, dbias, dgamma, dbeta = _site_bwd(
        src, src_moments, residual if residual_moments is not None else None, residual_moments, relu,
        None if kind == "pending" else x, dskip, *params, y, moments, g, sums,
        *call.stride, *call.padding, *call.dilation, call.groups, call.relu, call.training, need_source, need_weight,
        bits,
    )  # fmt: skip
    if not need_source:
        dsrc = dsums = None
    return SiteGrads(
        dsrc,
        None if kind == "plain" else dsums,
        _residual_gradient(dsrc, source) if need_source and kind == "join" else None,
        dresidual_sums if residual_moments is not None and need_source else None,
        dweight if need_weight else None,
        None if params[1] is None else dbias,
        None if params[2] is None else dgamma,
        None if params[3] is None else dbeta,
    )


def _residual_gradient(g: Tensor, source: Source) -> Tensor | None:
    if _pad_bwd is None or source.skip.kind != "pad" or source.residual is None:
        return library.residual_gradient(g, source)
    return _pad_bwd(g, source.residual, source.skip.stride, source.skip.channel_offset)


def infers() -> bool:
    """Whether the loaded library runs a site in inference."""
    return hasattr(torch.ops.resnet_fused, "site_infer")


def register() -> None:
    """Bind the ops' overloads and register their fakes, where the loaded library has them."""
    if not hasattr(torch.ops.resnet_fused, "site_fwd"):
        return
    if torch.ops.resnet_fused.site_fwd.default._schema.arguments[-1].name != "packed":
        return
    fakes: dict[str, Callable[..., Any]] = {"site_fwd": _fake_fwd, "site_rebuild": _fake_rebuild, "site_bwd": _fake_bwd}
    if infers():
        fakes["site_infer"] = _fake_infer
    if hasattr(torch.ops.resnet_fused, "pad_bwd"):
        fakes["pad_bwd"] = lambda g, x, stride, first: _channels_last(g, *x.shape)
    for name, fake in fakes.items():
        torch.library.register_fake(f"resnet_fused::{name}", fake)
        globals()[f"_{name}"] = getattr(torch.ops.resnet_fused, name).default


def _channels_last(like: Tensor, n: Any, c: Any, h: Any, w: Any) -> Tensor:
    return like.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _convolved(
    x: Tensor,
    weight: Tensor,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    dilation_h: int,
    dilation_w: int,
) -> Tensor:
    n, _, h, w = x.shape
    k, _, r, s = weight.shape
    p = (h + 2 * padding_h - dilation_h * (r - 1) - 1) // stride_h + 1
    q = (w + 2 * padding_w - dilation_w * (s - 1) - 1) // stride_w + 1
    return _channels_last(x, n, k, p, q)


def _fake_fwd(
    src: Tensor, src_moments: Any, residual: Any, residual_moments: Any, residual_stride: int, channel_offset: int,
    src_relu: bool, join: bool, weight: Tensor, conv_bias: Any, gamma: Any, beta: Any, running_mean: Any,
    running_var: Any, num_batches_tracked: Any, *static: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = _convolved(src, weight, *static[:6])
    wide, k = opmath(y.dtype), y.shape[1]
    x = _channels_last(src, *src.shape) if join else y.new_empty(0)
    return y, y.new_empty((5, k), dtype=wide), y.new_empty((2, k), dtype=wide), x


def _fake_infer(*arguments: Any) -> Tensor:
    return _convolved(arguments[0], arguments[2], *arguments[8:14])


def _fake_rebuild(*arguments: Any) -> Tensor:
    return _convolved(arguments[0], *arguments[7:14])


def _fake_bwd(
    src: Tensor, src_moments: Any, residual: Any, residual_moments: Any, src_relu: bool, x: Tensor | None, dskip: Any,
    weight: Tensor, conv_bias: Any, gamma: Any, beta: Any, y: Tensor, moments: Tensor, g: Tensor, sums: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *_, need_source, need_weight, _ = rest

    def nothing(like: Tensor) -> Tensor:
        return like.new_empty(0)

    def parameter(like: Tensor | None) -> Tensor:
        return nothing(sums) if like is None else like.new_empty(sums.shape[1])

    pending = need_source and src_moments is not None
    table = sums.new_empty((2, src.shape[1]))
    return (
        _channels_last(src, *src.shape) if need_source else nothing(y),
        table if pending else nothing(sums),
        _join_residual_sums(sums, src, residual_moments) if pending and x is not None else nothing(sums),
        torch.empty_like(weight) if need_weight else nothing(weight),
        parameter(conv_bias),
        parameter(gamma),
        parameter(beta),
    )


def _join_residual_sums(sums: Tensor, src: Tensor, residual_moments: Tensor | None) -> Tensor:
    return sums.new_empty(0) if residual_moments is None else sums.new_empty((2, src.shape[1]))
