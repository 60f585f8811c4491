"""A block's shortcut as a site run by the C++/CUDA projection ops, forward and backward.

What they take: a 1x1 convolution without padding, groups or dilation over a plain input, on the device their engine is
for. `site` sends every such site here; any other shortcut is a site like the rest. The kernels gather the pixels they
step over, so an input that is a view of every stride-th pixel is read in place.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import plan, projection, winners
from .calls import SiteCall, SiteGrads, SiteOutputs, SiteParams, Source, unhanded
from .engines import library
from .kernels.launch import attribute, is_counting
from .limits import first_order

_CPU = torch.device("cpu")
_DEVICES = {"cpu": "cpu", "triton": "cuda"}  # an engine to the device whose ops it uses


def takes(engine: str, x: Tensor, weight: Tensor, padding: tuple[int, int], groups: int) -> bool:
    """Whether the projection ops run a convolution of ``x`` for ``engine``."""
    device = _device(engine, x)
    return (
        device.type == _DEVICES.get(engine)
        and tuple(weight.shape[2:]) == (1, 1)
        and tuple(padding) == (0, 0)
        and groups == 1
        and weight.dtype in (x.dtype, torch.float32)
        and not plan.forced()
        and projection.unavailable(device, x.dtype) is None
    )


def _device(engine: str, x: Tensor) -> torch.device:
    """Where ``x`` is, or would be: a step of the CPU engine is counted on the meta device."""
    return _CPU if engine == "cpu" and x.is_meta and is_counting() else x.device


def runs(call: SiteCall, source: Source, weight: Tensor) -> bool:
    """Whether the projection ops run the site."""
    plain = call.projection and source.kind == "plain"
    return plain and takes(call.engine, source.y, weight, call.padding, call.groups) and _wins(call, source.y, weight)


def _wins(call: SiteCall, x: Tensor, weight: Tensor) -> bool:
    """Whether nothing else was measured to be faster; sizes that torch.compile keeps open were not measured."""
    device = _device(call.engine, x)
    winners.ready_for(device)
    if torch.compiler.is_compiling():
        known = torch.fx.experimental.symbolic_shapes.has_static_value
        if not all(known(size) for size in x.shape):
            return True
    if not winners.token:
        return not plan.is_small(call.engine, x.shape, weight.shape, x.dtype)
    convolution = (call.stride, call.padding, call.dilation, call.groups)
    return _extension_wins(
        call.engine, convolution, tuple(x.shape), tuple(x.stride()), tuple(weight.shape), x.dtype, device
    )


def _extension_wins(
    engine: str,
    convolution: tuple[Any, ...],
    size: tuple[int, ...],
    strides: tuple[int, ...],
    filters: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    shape = plan.shape_of(engine, convolution, True, size, strides, filters, dtype, device)
    return plan.shortcut(shape, engine).name == plan.EXTENSION


_extension_wins._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see `winners.ready`


def _stepped(call: SiteCall, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The dense input and the stride over it."""
    base, stride = unhanded(x)
    return base, (call.stride[0] * stride, call.stride[1] * stride)


def site_forward(engine: ModuleType, call: SiteCall, source: Source, params: SiteParams) -> SiteOutputs:
    """See `resnet_fused.site.site_forward`."""
    y, partials = _forward(call, source, params.weight, call.training)
    if not call.training:
        return SiteOutputs(y, library.eval_moments(engine, call, params, y.dtype), source.y)
    library.require_rows(y)
    return SiteOutputs(y, library.batch_moments(engine, call, params, partials), source.y)


def site_infer(engine: ModuleType, call: SiteCall, x: Tensor, params: SiteParams) -> Tensor:
    """The shortcut with running statistics, its batch norm in the convolution's epilogue."""
    moments = library.eval_moments(engine, call, params, x.dtype)
    base, stride = _stepped(call, x)
    filters = params.weight.to(x.dtype)
    return projection.projection_fwd(base, filters, None, stride, False, moments, None, None, False)[0]


def site_rebuild(call: SiteCall, source: Source, weight: Tensor) -> Tensor:
    """See `resnet_fused.site.site_rebuild`."""
    return _forward(call, source, weight, False)[0]


def _forward(call: SiteCall, source: Source, weight: Tensor, stats: bool) -> tuple[Tensor, Tensor]:
    x, stride = _stepped(call, source.y)
    return projection.projection_fwd(x, weight.to(x.dtype), None, stride, stats, None, None, None, False)


def site_backward(
    call: SiteCall,
    source: Source,
    weight: Tensor,
    y: Tensor,
    moments: Tensor,
    g: Tensor,
    sums: Tensor,
    dskip: Tensor | None,
    needs: tuple[bool, bool],
) -> SiteGrads:
    """See `resnet_fused.site.site_backward`. A shortcut has no ReLU of its own: ``g`` is taken as it is."""
    attribute(weight)
    normed = sums if call.training else None
    dx = dw = None
    if needs[0]:
        size = (source.y.shape[2], source.y.shape[3])
        filters = weight.to(g.dtype)
        dx = projection.projection_dgrad(g, y, filters, moments, normed, size, call.stride, dskip)
    if needs[1]:
        x, stride = _stepped(call, source.y)
        dw, _ = projection.projection_wgrad(g, y, x, moments, normed, stride, weight.dtype, False)
        dw = library.like_parameter(dw, weight)
    return SiteGrads(source=dx, weight=dw)


class PlainProjectionFunction(torch.autograd.Function):
    """A shortcut without batch norm: the convolution with its bias, as one node."""

    @staticmethod
    def forward(ctx: Any, stride: tuple[int, int], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.stride, ctx.bias_dtype = stride, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)
        return projection.projection_fwd(x, weight.to(x.dtype), bias, stride, False, None, None, None, False)[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, need_x, need_weight, need_bias = ctx.needs_input_grad
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dweight = dbias = None
        if need_x:
            size = (x.shape[2], x.shape[3])
            dx = projection.projection_dgrad(dy, None, weight.to(dy.dtype), None, None, size, ctx.stride, None)
        if need_weight or need_bias:
            made = projection.projection_wgrad(dy, None, x, None, None, ctx.stride, weight.dtype, need_bias)
            dweight = library.like_parameter(made[0], weight) if need_weight else None
            dbias = made[1].to(ctx.bias_dtype) if need_bias else None
        return None, dx, dweight, dbias
