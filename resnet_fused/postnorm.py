"""The autograd node of a batch norm that stands between a block's add and its ReLU.

It reads the sum, which the chain's close has materialised, and gives it a site's currency: the sum stands for the raw
output, with moments and a carrier of its own, so that whoever reads it next applies affine and ReLU and brings the
masked gradient and its sums (`nodes`). Passes over the sum: R for the statistics forward, 2R and W backward; the sum
itself is kept, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import engines
from .calls import SiteCall, SiteParams
from .engines import library
from .nodes import first_order, vector_gradients


class PostNormFunction(torch.autograd.Function):
    """``(sum, moments, carrier)`` of a sum and the tensors of a batch norm; ``call`` and `SiteParams` as a site's."""

    @staticmethod
    def forward(ctx: Any, call: SiteCall, total: Tensor, *params: Tensor | None) -> tuple[Tensor, ...]:
        """The statistics; the sum itself goes through."""
        bound = SiteParams(*params)  # type: ignore[arg-type]
        moments = library.site_moments(engines.get(call.engine), call, total, bound)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, moments, bound.gamma, bound.beta)
        ctx.mark_non_differentiable(moments)
        return total.view_as(total), moments, moments.new_empty((2, moments.shape[1]))

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor, _: Tensor | None, sums: Tensor) -> tuple[Any, ...]:
        """The gradient of the sum, of gamma and of beta, from what the consumer brings."""
        total, moments, gamma, beta = ctx.saved_tensors
        call, engine = ctx.call, engines.get(ctx.call.engine)
        coef = engine.bn_bwd_finalize(sums, moments, call.training)
        dtotal = engine.bn_bwd_apply(g, total, moments, coef, call.relu) if ctx.needs_input_grad[1] else None
        vectors = vector_gradients(call, (None, None, gamma, beta), moments, sums, ctx.needs_input_grad[2:])
        return (None, dtotal, None, *vectors, None, None, None)
