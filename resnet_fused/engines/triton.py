"""The Triton engine: whole sites on a GPU, bf16, fp16 and fp32.

Importing this module imports Triton; `resnet_fused.engines` does so when the engine is first chosen. Every function
is a registered operator (`triton_ops`), but while launches are only counted (`kernels.launch.recording`).
A site is one operator: convolution, statistics and finalise in the forward; both gradients in the backward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..calls import SiteCall, SiteGrads, SiteOutputs, SiteParams, Source
from ..kernels.launch import is_counting
from ..reference import conv_bwd, conv_fwd
from . import library
from .triton_ops import OPERATORS, flat, implementation

__all__ = [
    "bn_apply",
    "bn_bwd_apply",
    "bn_bwd_finalize",
    "bn_bwd_reduce",
    "bn_bwd_reduce_rebuild",
    "bn_eval_moments",
    "bn_finalize",
    "bn_stats",
    "conv_bwd",
    "conv_fwd",
    "join_bwd_reduce",
    "pool_apply",
    "pool_bwd",
    "site_backward",
    "site_forward",
    "site_infer",
    "site_rebuild",
]


def _run(name: str, *arguments: Any) -> Any:
    return implementation(name)(*arguments) if is_counting() else OPERATORS[name](*arguments)


def _absent(t: Tensor, wanted: bool) -> Tensor | None:
    return t if wanted else None


def site_forward(call: SiteCall, source: Source, params: SiteParams) -> SiteOutputs:
    """See `resnet_fused.site.site_forward`."""
    y, moments, x, mask = _run("site_forward", *flat(call, source), *params)
    return SiteOutputs(y, moments, {"plain": source.y, "join": x, "pending": None}[source.kind], mask)


def site_infer(call: SiteCall, x: Tensor, params: SiteParams, residual: Tensor | None, relu: bool) -> Tensor:
    """``act(bn(conv(x)) + residual)`` with running statistics. See `triton_site.site_infer`."""
    return _run("site_infer", *flat(call), x, *params[:6], residual, relu)


def site_rebuild(call: SiteCall, source: Source, weight: Tensor) -> Tensor:
    """See `resnet_fused.site.site_rebuild`."""
    return _run("site_rebuild", *flat(call, source), weight)


def site_backward(
    call: SiteCall,
    source: Source,
    x: Tensor | None,
    weight: Tensor,
    y: Tensor,
    moments: Tensor,
    g: Tensor,
    sums: Tensor,
    dskip: Tensor | None,
    needs: tuple[bool, bool],
    mask: Tensor | None = None,
) -> SiteGrads:
    """See `resnet_fused.site.site_backward`."""
    tensors = (x, weight, y, moments, g, sums, dskip, mask)
    dx, source_sums, residual_sums, dw = _run("site_backward", *flat(call, source), *tensors, *needs)
    return SiteGrads(
        _absent(dx, needs[0]),
        _absent(source_sums, needs[0] and source.kind != "plain"),
        library.residual_gradient(dx, source) if needs[0] and source.kind == "join" else None,
        _absent(residual_sums, needs[0] and source.residual_moments is not None),
        _absent(dw, needs[1]),
    )


def bn_stats(y: Tensor) -> Tensor:
    """See `reference.bn_stats`."""
    return _run("bn_stats", y)


def bn_finalize(*arguments: Any) -> Tensor:
    """See `reference.bn_finalize`."""
    return _run("bn_finalize", *arguments)


def bn_eval_moments(*arguments: Any) -> Tensor:
    """See `reference.bn_eval_moments`."""
    return _run("bn_eval_moments", *arguments)


def bn_apply(*arguments: Any) -> Tensor:
    """See `reference.bn_apply`."""
    return _run("bn_apply", *arguments)


def bn_bwd_reduce(*arguments: Any) -> Tensor:
    """See `reference.bn_bwd_reduce`."""
    return _run("bn_bwd_reduce", *arguments)


def bn_bwd_reduce_rebuild(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `reference.bn_bwd_reduce_rebuild`."""
    return _run("bn_bwd_reduce_rebuild", *arguments)


def join_bwd_reduce(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.join_bwd_reduce`."""
    return _run("join_bwd_reduce", *arguments)


def bn_bwd_finalize(*arguments: Any) -> Tensor:
    """See `reference.bn_bwd_finalize`."""
    return _run("bn_bwd_finalize", *arguments)


def bn_bwd_apply(*arguments: Any) -> Tensor:
    """See `reference.bn_bwd_apply`."""
    return _run("bn_bwd_apply", *arguments)


def pool_apply(*arguments: Any) -> Tensor:
    """See `reference.pool_apply`."""
    return _run("pool_apply", *arguments)


def pool_bwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `reference.pool_bwd`."""
    return _run("pool_bwd", *arguments)
