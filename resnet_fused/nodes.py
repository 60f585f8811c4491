"""The autograd nodes of a chain: one per site, one for a chain's close, one for a stem's max pool.

In the backward the gradient slots are carriers. A site's outputs are ``(y, moments, carrier, x)``: the
slot of ``y`` brings the gradient ``g`` of the site's activation, the slot of ``carrier`` (an empty
``(2, K)`` tensor that exists for its slot alone) brings ``sum g`` and ``sum g * xhat``, both made by
the one consumer; the slot of ``x``, the activation the site convolved, brings the gradient of the skip
connection, so that the sum of a block's two gradients happens inside the site. A site hands the same
three things up. So the schedule is the autograd graph itself, and gradients reach DDP site by site.

The rule that keeps it right: a pending activation has exactly one consumer, and none leaves a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import engines
from .calls import NO_SKIP, SiteCall, SiteGrads, SiteParams, Skip, Source, handed
from .limits import first_order
from .site import close_backward, load_source, site_backward, site_forward


class Pending(NamedTuple):
    """A raw convolution output and what its one consumer must do to it: a chain's inner currency."""

    y: Tensor
    moments: Tensor
    carrier: Tensor
    relu: bool
    skip: Skip = NO_SKIP
    residual: Tensor | None = None
    residual_moments: Tensor | None = None
    residual_carrier: Tensor | None = None


class NodeCall(NamedTuple):
    """What is static about a node: how its source is read, and its sites."""

    kind: str  # of the source: plain, pending or join
    source_relu: bool
    source_skip: Skip
    sites: tuple[SiteCall, ...]
    projection: SiteCall | None = None
    skip: Skip = NO_SKIP  # of the close, in a recomputing node
    relu: bool = True
    hands: bool = True  # whether a plain source is handed on, for the block's shortcut


def site_gradients(
    call: SiteCall,
    source: Source,
    x: Tensor | None,
    params: Sequence[Tensor | None],
    y: Tensor,
    moments: Tensor,
    g: Tensor,
    sums: Tensor,
    dskip: Tensor | None,
    need_source: bool,
    needs: tuple[bool, ...],
    mask: Tensor | None = None,
) -> tuple[SiteGrads, tuple[Tensor | None, ...]]:
    """`site_backward`, and the gradients of the site's `SiteParams`, of which ``params`` are the first four.

    A convolution bias before batch statistics has gradient exactly zero, but for a NaN or Inf on its way.
    """
    grads = site_backward(call, source, x, params, y, moments, g, sums, dskip, (need_source, needs[0]), mask)
    vectors = grads.conv_bias, grads.gamma, grads.beta
    if grads.beta is None:
        vectors = vector_gradients(call, params, moments, sums, needs)
    return grads, (grads.weight, *vectors, None, None, None)


def vector_gradients(
    call: SiteCall, params: Sequence[Tensor | None], moments: Tensor, sums: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the convolution's bias and of the batch norm's affine, where they are wanted."""
    _, bias, gamma, beta = params
    sum_g, sum_gx = sums.unbind()
    dbias = dgamma = dbeta = None
    if needs[1] and bias is not None:
        dbias = ((sum_g + sum_gx) * 0 if call.training else moments[2] * sum_g).to(bias.dtype)
    if needs[2] and gamma is not None:
        dgamma = sum_gx if gamma.dtype == sum_gx.dtype else sum_gx.to(gamma.dtype)
    if needs[3] and beta is not None:
        dbeta = sum_g if beta.dtype == sum_g.dtype else sum_g.to(beta.dtype)
    return dbias, dgamma, dbeta


class SiteFunction(torch.autograd.Function):
    """One site as one node: ``(y, moments, carrier, x)``, without ``x`` for a pending source.

    ``x`` is what the block's shortcut reads of the activation (`calls.handed`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: NodeCall,
        src: Tensor,
        src_moments: Tensor | None,
        src_carrier: Tensor | None,
        residual: Tensor | None,
        residual_moments: Tensor | None,
        residual_carrier: Tensor | None,
        *params: Tensor | None,
    ) -> tuple[Tensor, ...]:
        kind, source_relu, source_skip, (site, *_) = call[:4]
        source = Source(kind, src, src_moments, source_relu, source_skip, residual, residual_moments)
        y, moments, x, mask, carrier = site_forward(site, source, SiteParams(*params))  # type: ignore[arg-type]
        keep_residual = residual_moments is not None or source_skip.kind == "pad"
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            src,
            src_moments,
            x if kind == "join" else None,
            residual if keep_residual else None,
            residual_moments,
            *params[:4],
            y,
            moments,
            mask,
        )
        ctx.mark_non_differentiable(moments)
        if carrier is None:
            carrier = moments.new_empty((2, moments.shape[1]))
        if kind == "pending" or not (call.hands or kind == "join"):
            return y, moments, carrier
        passed = handed(src if x is None else x, site.hand_stride)
        return y, moments, carrier, passed.view_as(passed) if passed is src else passed

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, _: Tensor | None, sums: Tensor, dskip: Tensor | None = None) -> tuple[Any, ...]:
        src, src_moments, x, residual, residual_moments, *params, y, moments, mask = ctx.saved_tensors
        call: NodeCall = ctx.call
        needs = ctx.needs_input_grad
        source = Source(call.kind, src, src_moments, call.source_relu, call.source_skip, residual, residual_moments)
        x = src if call.kind == "plain" else x
        need_source = needs[1] or needs[4]
        grads, own = site_gradients(
            call.sites[0], source, x, params, y, moments, g, sums, dskip, need_source, needs[7:], mask
        )
        return None, grads.source, None, grads.source_sums, grads.residual, None, grads.residual_sums, *own


class CloseFunction(torch.autograd.Function):
    """The end of a chain: ``out = act(z + shortcut)``, or the max pool of a stem when ``pool`` is given.

    ``wide`` is the dtype of an out-of-place add that promotes, else None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        engine: str,
        relu: bool,
        skip: Skip,
        wide: torch.dtype | None,
        y: Tensor,
        moments: Tensor,
        carrier: Tensor,
        residual: Tensor | None,
        residual_moments: Tensor | None,
        residual_carrier: Tensor | None,
    ) -> Tensor:
        source = Source("join", _widen(y, wide), moments, relu, skip, _widen(residual, wide), residual_moments)
        out = load_source(engine, source)
        keep_residual = residual_moments is not None or skip.kind == "pad"
        ctx.static = (engine, relu, skip, wide)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.save_for_backward(
            y,
            moments,
            out if relu and skip.kind != "none" else None,
            residual if keep_residual else None,
            residual_moments,
        )
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        engine, relu, skip, wide = ctx.static
        y, moments, out, residual, residual_moments = ctx.saved_tensors
        source = Source("join", _widen(y, wide), moments, relu, skip, _widen(residual, wide), residual_moments)
        dout = dout.contiguous(memory_format=torch.channels_last)
        grads = close_backward(engine, source, out, dout, None)
        residual_grad = grads.residual
        if wide is not None and residual_grad is not None:
            residual_grad = residual_grad.to(ctx.residual_dtype)
        source_grad = None if grads.source is None else grads.source.to(y.dtype)
        return (*[None] * 4, source_grad, None, grads.source_sums, residual_grad, None, grads.residual_sums)


def _widen(t: Tensor | None, dtype: torch.dtype | None) -> Any:
    return t if t is None or dtype is None else t.to(dtype)


class PoolFunction(torch.autograd.Function):
    """The end of a stem: max pool of ``act(z)``, which is never stored; arg-max recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any, engine: str, relu: bool, window: tuple[Any, Any, Any], y: Tensor, moments: Tensor, carrier: Tensor
    ) -> Tensor:
        ctx.static = (engine, relu, window)
        ctx.save_for_backward(y, moments)
        return engines.get(engine).pool_apply(y, moments, *window, relu)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        engine, relu, window = ctx.static
        y, moments = ctx.saved_tensors
        dout = dout.contiguous(memory_format=torch.channels_last)
        g, sums = engines.get(engine).pool_bwd(dout, y, moments, *window, relu)
        return None, None, None, g, None, sums
