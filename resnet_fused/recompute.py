"""The autograd node of the memory modes "lean" and "min": it rebuilds instead of keeping.

Kept for backward, in units of a bottleneck's N * width * P * Q: "speed" x 4, y1 1, y2 1, y3 4;
"lean" drops y3 (this node over the last site and the close); "min" keeps x alone
(this node over the whole block). Eager keeps two more activations: 12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .calls import SiteParams, Source
from .limits import first_order
from .nodes import NodeCall, site_gradients
from .site import close_backward, load_source, site_forward, site_rebuild

PARAMS = len(SiteParams._fields)


class RecomputeFunction(torch.autograd.Function):
    """Sites and close as one node that keeps no raw output: each ``y`` is rebuilt by its own convolution.

    Its source is plain (a whole block, "min") or pending (the last site, "lean"). The moments are kept,
    so statistics and running buffers move once.
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
    ) -> Tensor:
        groups = [SiteParams(*params[i : i + PARAMS]) for i in range(0, len(params), PARAMS)]  # type: ignore[arg-type]
        source = Source(call.kind, src, src_moments, call.source_relu)
        kept = []
        for site, p in zip(call.sites, groups, strict=False):
            y, moments = site_forward(site, source, p)[:2]
            kept.append(moments)
            source = Source("pending", y, moments, site.relu)
        outer_residual = residual if residual_moments is not None else None
        ctx.outer = residual is not None
        if call.projection is not None:
            residual, residual_moments = site_forward(call.projection, Source("plain", src), groups[-1])[:2]
            kept.append(residual_moments)
        elif residual is None and call.skip.kind != "none":
            residual = src
        engine = call.sites[0].engine
        out = load_source(engine, Source("join", y, moments, call.relu, call.skip, residual, residual_moments))
        ctx.call = call
        ctx.save_for_backward(
            src,
            src_moments,
            outer_residual,
            None if call.projection is not None else residual_moments,
            out if call.relu and call.skip.kind != "none" else None,
            residual if call.skip.kind == "pad" else None,
            *kept,
            *(t for p in groups for t in p[:4]),
        )
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        call: NodeCall = ctx.call
        src, src_moments, residual, residual_moments, out, padded, *rest = ctx.saved_tensors
        count = len(call.sites) + (call.projection is not None)
        kept, flat = rest[:count], rest[count:]
        groups = [tuple(flat[i : i + 4]) for i in range(0, len(flat), 4)]
        needs = [ctx.needs_input_grad[7 + i * PARAMS : 7 + (i + 1) * PARAMS] for i in range(count)]
        need_src = ctx.needs_input_grad[1]
        engine = call.sites[0].engine

        sources, ys = _rebuild(call, Source(call.kind, src, src_moments, call.source_relu), kept, groups)
        if call.projection is not None:
            residual = site_rebuild(call.projection, Source("plain", src), groups[-1][0])
            residual_moments = kept[-1]
        elif padded is not None:
            residual = padded
        dout = dout.contiguous(memory_format=torch.channels_last)
        end = Source("join", ys[-1], kept[len(ys) - 1], call.relu, call.skip, residual, residual_moments)
        grads = close_backward(engine, end, out, dout, None)
        g: Any = grads.source
        sums: Any = grads.source_sums
        dskip: Any = grads.residual
        residual_sums: Any = grads.residual_sums

        own: list[tuple[Tensor | None, ...]] = []
        if call.projection is not None:
            branch, last = site_gradients(
                call.projection, Source("plain", src), src, groups[-1], residual, residual_moments,
                dskip, residual_sums, None, need_src, needs[-1],
            )  # fmt: skip
            own.append(last)
            dskip = branch.source
        for i in reversed(range(len(ys))):
            x, skip = (src, None if ctx.outer else dskip) if sources[i].kind == "plain" else (None, None)
            need = need_src or i > 0
            step, last = site_gradients(
                call.sites[i], sources[i], x, groups[i], ys[i], kept[i], g, sums, skip, need, needs[i]
            )
            own.append(last)
            g, sums = step.source, step.source_sums
        outer = (dskip, None, residual_sums) if ctx.outer else (None, None, None)
        return (None, g, None, sums, *outer, *(t for grads_of in reversed(own) for t in grads_of))


def _rebuild(
    call: NodeCall, source: Source, kept: list[Tensor], groups: list[tuple[Tensor, ...]]
) -> tuple[list[Source], list[Tensor]]:
    """The sources and raw outputs of a recomputed node's sites, made again as the forward made them."""
    sources, ys = [], []
    for site, moments, p in zip(call.sites, kept, groups, strict=False):
        y = site_rebuild(site, source, p[0])
        sources.append(source)
        ys.append(y)
        source = Source("pending", y, moments, site.relu)
    return sources, ys
