"""The autograd node of a block's last site where the block ends there: the site and the close in one.

What is computed and kept is what a site's node and a close's do (`nodes`); a block that is called alone then has one
node less, whose cost a small activation feels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .calls import SiteParams, Source
from .limits import first_order
from .nodes import NodeCall, site_gradients
from .site import close_backward, load_source, site_forward


class ClosedSiteFunction(torch.autograd.Function):
    """``act(z + shortcut)`` of a site whose source is pending; ``call.skip`` and ``call.relu`` are the close's."""

    @staticmethod
    def forward(
        ctx: Any,
        call: NodeCall,
        src: Tensor,
        src_moments: Tensor,
        src_carrier: Tensor,
        residual: Tensor | None,
        residual_moments: Tensor | None,
        residual_carrier: Tensor | None,
        *params: Tensor | None,
    ) -> Tensor:
        (site,), skip, relu = call.sites, call.skip, call.relu
        source = Source("pending", src, src_moments, call.source_relu)
        made = site_forward(site, source, SiteParams(*params))  # type: ignore[arg-type]
        y, moments = made.y, made.moments
        out = load_source(site.engine, Source("join", y, moments, relu, skip, residual, residual_moments))
        keep_residual = residual_moments is not None or skip.kind == "pad"
        ctx.call = call
        ctx.save_for_backward(
            src,
            src_moments,
            residual if keep_residual else None,
            residual_moments,
            out if relu and skip.kind != "none" else None,
            y,
            moments,
            *params[:4],
        )
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        call: NodeCall = ctx.call
        src, src_moments, residual, residual_moments, out, y, moments, *params = ctx.saved_tensors
        needs, site = ctx.needs_input_grad, call.sites[0]
        dout = dout.contiguous(memory_format=torch.channels_last)
        end = Source("join", y, moments, call.relu, call.skip, residual, residual_moments)
        grads = close_backward(site.engine, end, out, dout, None)
        g, sums = grads.source, grads.source_sums
        assert g is not None and sums is not None
        source = Source("pending", src, src_moments, call.source_relu)
        step, own = site_gradients(site, source, None, params, y, moments, g, sums, None, needs[1], needs[7:])
        return None, step.source, None, step.source_sums, grads.residual, None, grads.residual_sums, *own
