"""Registration: every function of the Triton engine as an operator ``resnet_fused_triton::<name>`` with a fake.

So `torch.compile` sees one opaque node per site and never traces the plan or a launch. Operators are pure but for the
running buffers and the counter of `site_forward` and `bn_finalize`. An absent tensor result is an empty one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..calls import SiteCall, SiteGrads, SiteParams, Skip, Source
from ..kernels.geometry import new_mask
from . import triton_primitives as primitives
from . import triton_site

NAMESPACE = "resnet_fused_triton"
_CALL = (
    "int[2] stride, int[2] padding, int[2] dilation, int groups, bool relu, bool training, float? momentum, float eps, "
    "int hand_stride, bool projection"
)
_SOURCE = (
    "str kind, Tensor src, Tensor? src_moments, bool src_relu, str skip, int skip_stride, int channel_offset, "
    "Tensor? residual, Tensor? residual_moments"
)
_RUNNING = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"
_FIXED = "Tensor? running_mean, Tensor? running_var"
_WINDOW = "int[2] kernel, int[2] stride, int[2] padding, bool relu"

SCHEMAS = {
    "site_forward": f"({_CALL}, {_SOURCE}, Tensor weight, Tensor? conv_bias, Tensor? gamma, Tensor? beta, {_RUNNING})"
    " -> (Tensor y, Tensor moments, Tensor x, Tensor mask)",
    "site_infer": f"({_CALL}, Tensor x, Tensor weight, Tensor? conv_bias, Tensor? gamma, Tensor? beta, {_FIXED}, "
    "Tensor? residual, bool act) -> Tensor",
    "site_rebuild": f"({_CALL}, {_SOURCE}, Tensor weight) -> Tensor",
    "site_backward": f"({_CALL}, {_SOURCE}, Tensor? x, Tensor weight, Tensor y, Tensor moments, Tensor g, Tensor sums, "
    "Tensor? dskip, Tensor? mask, bool need_source, bool need_weight)"
    " -> (Tensor source, Tensor source_sums, Tensor residual_sums, Tensor weight)",
    "bn_stats": "(Tensor y) -> Tensor",
    "bn_finalize": f"(Tensor partials, Tensor? weight, Tensor? bias, Tensor? conv_bias, {_RUNNING}, float? momentum, "
    "float eps) -> Tensor",
    "bn_eval_moments": "(Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? conv_bias, "
    "float eps, ScalarType dtype) -> Tensor",
    "bn_apply": "(Tensor y, Tensor moments, Tensor? residual, Tensor? residual_moments, int residual_stride, "
    "int channel_offset, bool relu) -> Tensor",
    "bn_bwd_reduce": "(Tensor dout, Tensor y, Tensor moments, bool relu) -> Tensor",
    "bn_bwd_reduce_rebuild": "(Tensor dout, Tensor y, Tensor moments, bool relu) -> (Tensor, Tensor)",
    "join_bwd_reduce": "(Tensor dout, Tensor? dskip, Tensor? out, Tensor y, Tensor moments, Tensor? residual_y, "
    "Tensor? residual_moments) -> (Tensor, Tensor, Tensor)",
    "bn_bwd_finalize": "(Tensor sums, Tensor moments, bool training) -> Tensor",
    "bn_bwd_apply": "(Tensor g, Tensor y, Tensor moments, Tensor coef, bool relu) -> Tensor",
    "pool_apply": f"(Tensor y, Tensor moments, {_WINDOW}) -> Tensor",
    "pool_bwd": f"(Tensor dout, Tensor y, Tensor moments, {_WINDOW}) -> (Tensor, Tensor)",
}
_CALL_ARGUMENTS = 10
_SOURCE_ARGUMENTS = 9


def _call(arguments: tuple[Any, ...]) -> SiteCall:
    stride, padding, dilation, *rest = arguments[:_CALL_ARGUMENTS]
    return SiteCall("triton", tuple(stride), tuple(padding), tuple(dilation), *rest)


def _source(arguments: tuple[Any, ...]) -> Source:
    kind, src, moments, relu, skip, stride, offset, residual, residual_moments = arguments
    return Source(kind, src, moments, relu, Skip(skip, stride, offset), residual, residual_moments)


def _site(arguments: tuple[Any, ...]) -> tuple[SiteCall, Source, tuple[Any, ...]]:
    end = _CALL_ARGUMENTS + _SOURCE_ARGUMENTS
    return _call(arguments), _source(arguments[_CALL_ARGUMENTS:end]), arguments[end:]


def _nothing(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _site_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, source, rest = _site(arguments)
    y, moments, x, mask, _ = triton_site.site_forward(call, source, SiteParams(*rest))
    return y, moments, _nothing(y) if x is None else x, _nothing(y, torch.uint8) if mask is None else mask


def _site_infer(*arguments: Any) -> Tensor:
    x, weight, conv_bias, gamma, beta, mean, var, residual, act = arguments[_CALL_ARGUMENTS:]
    params = SiteParams(weight, conv_bias, gamma, beta, mean, var, None)
    return triton_site.site_infer(_call(arguments), x, params, residual, act)


def _site_rebuild(*arguments: Any) -> Tensor:
    call, source, (weight,) = _site(arguments)
    return triton_site.site_rebuild(call, source, weight)


def _site_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, source, (x, weight, y, moments, g, sums, dskip, mask, *needs) = _site(arguments)
    grads = triton_site.site_backward(call, source, x, weight, y, moments, g, sums, dskip, tuple(needs), mask)
    results = (grads.source, grads.source_sums, grads.residual_sums, grads.weight)
    return tuple(_nothing(y) if t is None else t for t in results)  # type: ignore[return-value]


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "site_forward": _site_forward,
    "site_infer": _site_infer,
    "site_rebuild": _site_rebuild,
    "site_backward": _site_backward,
}


def flat(call: SiteCall, source: Source | None = None) -> tuple[Any, ...]:
    """The leading arguments of a site's operators."""
    described = call[1 : 1 + _CALL_ARGUMENTS]
    if source is None:
        return described
    skip = source.skip
    tensors = (source.residual, source.residual_moments)
    return (
        *described, source.kind, source.y, source.moments, source.relu,
        skip.kind, skip.stride, skip.channel_offset, *tensors,
    )  # fmt: skip


def _like(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _raw_output(call: SiteCall, x: Tensor, weight: Tensor) -> Tensor:
    k, _, *taps = weight.shape
    sides = zip(x.shape[2:], call.padding, call.dilation, taps, call.stride, strict=True)
    p, q = (((size + 2 * pad - dil * (tap - 1) - 1) // step + 1) for size, pad, dil, tap, step in sides)
    return x.new_empty_strided((x.shape[0], k, p, q), (p * q * k, 1, q * k, k))


def _table(rows: int, of: Tensor, channels: Any) -> Tensor:
    return of.new_empty((rows, channels), dtype=torch.float32)


def _fake_site_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, source, rest = _site(arguments)
    y = _raw_output(call, source.y, rest[0])
    mask = new_mask(source.y) if triton_site.keeps_mask(source) else None
    x = _like(source.y) if source.kind == "join" else _nothing(y)
    return y, _table(5, y, y.shape[1]), x, _nothing(y, torch.uint8) if mask is None else mask


def _fake_site_rebuild(*arguments: Any) -> Tensor:
    call, source, (weight,) = _site(arguments)
    return _raw_output(call, source.y, weight)


def _fake_site_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, source, (_, weight, y, _, _, _, _, _, need_source, need_weight) = _site(arguments)
    dw = torch.empty_like(weight) if need_weight else _nothing(y)
    if not need_source:
        return _nothing(y), _nothing(y), _nothing(y), dw
    channels = source.y.shape[1]
    sums = _nothing(y) if source.kind == "plain" else _table(2, y, channels)
    residual_sums = _nothing(y) if source.residual_moments is None else _table(2, y, channels)
    return _like(source.y), sums, residual_sums, dw


def _fake_bn_stats(y: Tensor) -> Tensor:
    partials = torch.library.get_ctx().new_dynamic_size()  # the kernel's own choice
    return y.new_empty((partials, 3, y.shape[1]), dtype=torch.float32)


def _fake_pool(y: Tensor, moments: Tensor, kernel: Any, stride: Any, padding: Any, relu: bool) -> Tensor:
    p, q = ((n + 2 * pad - k) // s + 1 for n, k, s, pad in zip(y.shape[2:], kernel, stride, padding, strict=True))
    return y.new_empty_strided((y.shape[0], y.shape[1], p, q), (p * q * y.shape[1], 1, q * y.shape[1], y.shape[1]))


def _fake_join(dout: Tensor, dskip: Any, out: Any, y: Tensor, moments: Tensor, residual_y: Any, residual: Any) -> Any:
    return _like(y), _table(2, y, y.shape[1]), _nothing(moments) if residual is None else _table(2, y, y.shape[1])


_FAKES: dict[str, Callable[..., Any]] = {
    "site_forward": _fake_site_forward,
    "site_infer": lambda *a: _raw_output(_call(a), a[_CALL_ARGUMENTS], a[_CALL_ARGUMENTS + 1]),
    "site_rebuild": _fake_site_rebuild,
    "site_backward": _fake_site_backward,
    "bn_stats": _fake_bn_stats,
    "bn_finalize": lambda partials, *rest: _table(5, partials, partials.shape[2]),
    "bn_eval_moments": lambda mean, *rest: _table(5, mean, mean.shape[0]),
    "bn_apply": lambda y, *rest: _like(y),
    "bn_bwd_reduce": lambda dout, y, *rest: _table(2, y, y.shape[1]),
    "bn_bwd_reduce_rebuild": lambda dout, y, *rest: (_table(2, y, y.shape[1]), _like(y)),
    "join_bwd_reduce": _fake_join,
    "bn_bwd_finalize": lambda sums, moments, training: _table(3 if training else 1, sums, sums.shape[1]),
    "bn_bwd_apply": lambda g, y, *rest: _like(y),
    "pool_apply": _fake_pool,
    "pool_bwd": lambda dout, y, *rest: (_like(y), _table(2, y, y.shape[1])),
}

_library = torch.library.Library(NAMESPACE, "DEF")


def implementation(name: str) -> Callable[..., Any]:
    """The function behind an operator."""
    found = _IMPLEMENTATIONS.get(name)
    return getattr(primitives, name) if found is None else found


def _register() -> dict[str, Any]:
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, implementation(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _FAKES[name], lib=_library)
    return {name: getattr(getattr(torch.ops, NAMESPACE), name).default for name in SCHEMAS}


OPERATORS = _register()

__all__ = ["NAMESPACE", "OPERATORS", "SCHEMAS", "SiteGrads", "flat", "implementation"]
