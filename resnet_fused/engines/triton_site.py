"""A whole site on a GPU: our convolution kernels where the plan says so, the library's elsewhere.

These run inside registered operators (`triton_ops`), so the plan is never traced. Outputs and saved tensors are the
same for both variants.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from .. import plan
from ..calls import SiteCall, SiteGrads, SiteOutputs, SiteParams, Source
from ..kernels import pack
from ..kernels.conv_dgrad import DgradEpilogue, conv_dgrad
from ..kernels.conv_fwd import RAW, Epilogue, conv_fwd
from ..kernels.conv_wgrad import conv_wgrad
from ..kernels.geometry import PLAIN, Geometry, Prologue, loadable, new_mask
from ..kernels.gradient import Gradient
from ..kernels.launch import attribute
from . import library
from . import triton_primitives as primitives

_PRIMITIVES = sys.modules[primitives.__name__]
_shape = plan.shape_of_call


def _runs_own(shape: plan.ConvShape) -> bool:
    return plan.choose(shape).name == plan.OWN


def _refuse(shape: plan.ConvShape, error: Exception) -> None:
    what = f"our {shape.filter[0]}x{shape.filter[1]} convolution of {shape.c} into {shape.k} channels"
    plan.refuse(shape, primitives.notice(what, error, "the library's"))


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _input(source: Source) -> Tensor:
    """The source's tensor as a kernel may load it: a plain one may be a view that steps over pixels."""
    return loadable(source.y) if source.kind == "plain" else _dense(source.y)


def keeps_mask(source: Source) -> bool:
    """Whether a site keeps its ReLU's mask as bits, where its channels allow; never the plan's choice."""
    return source.kind == "join" and source.relu


def _prologue(source: Source, geometry: Geometry) -> tuple[Tensor, Prologue, Tensor | None]:
    """What the kernel loads and how, and the activation where it had to be materialised first.

    A join stores the activation while it loads it, which needs one owner per pixel and a shortcut of its shape.
    """
    if plan.prologue(plan.OWN, source.kind, source.skip.kind, geometry.owns_every_pixel).name == "materialised":
        out = library.load_source(_PRIMITIVES, source)
        return out, PLAIN, out
    residual = None if source.residual is None else _dense(source.residual)
    mask = new_mask(source.y) if keeps_mask(source) else None
    prologue = Prologue(source.kind, source.moments, source.relu, residual, source.residual_moments, mask)
    return _input(source), prologue, None


class _OwnConv(NamedTuple):
    """What our forward convolution makes; ``x`` and ``mask`` are a join's."""

    y: Tensor
    partials: Tensor | None
    x: Tensor | None
    mask: Tensor | None


def _own_conv(call: SiteCall, source: Source, weight: Tensor, epilogue: Epilogue) -> _OwnConv:
    geometry = Geometry.of(_input(source), weight, call.stride, call.padding, call.dilation)
    x, prologue, materialised = _prologue(source, geometry)
    if prologue.kind == "plain" and pack.packs_image(geometry):
        packed, taps = pack.packed_geometry(geometry)
        filters = pack.pack_weight(weight, x.dtype, taps)
        y, partials, _ = conv_fwd(pack.pack_image(x, geometry), filters, packed, PLAIN, epilogue)
        return _OwnConv(y, partials, materialised, None)
    y, partials, out = conv_fwd(x, pack.pack_weight(weight, x.dtype), geometry, prologue, epilogue)
    return _OwnConv(y, partials, out if materialised is None else materialised, prologue.mask)


def site_forward(call: SiteCall, source: Source, params: SiteParams) -> SiteOutputs:
    """``x`` and ``mask`` are a join's, else None. See `resnet_fused.site.site_forward`."""
    attribute(params.weight)
    shape = _shape(call, source.y, params.weight)
    made: SiteOutputs | None = None
    if _runs_own(shape):
        epilogue = Epilogue("statistics" if call.training else "raw")
        try:
            own = _own_conv(call, source, params.weight, epilogue)
        except primitives.COMPILE_ERRORS as error:
            _refuse(shape, error)
        else:
            made = SiteOutputs(own.y, _own_moments(call, own, params), own.x, own.mask)
    if made is None:
        made = library.site_forward(_PRIMITIVES, call, source, params)
    if source.kind != "join":
        return made._replace(x=None)
    if made.mask is None and made.x is not None and keeps_mask(source):
        return made._replace(mask=pack.pack_mask(made.x))
    return made


def _own_moments(call: SiteCall, own: _OwnConv, params: SiteParams) -> Tensor:
    if own.partials is None:
        return library.eval_moments(_PRIMITIVES, call, params, own.y.dtype)
    library.require_rows(own.y)
    return library.batch_moments(_PRIMITIVES, call, params, own.partials)


def site_rebuild(call: SiteCall, source: Source, weight: Tensor) -> Tensor:
    """``y`` again. See `resnet_fused.site.site_rebuild`."""
    attribute(weight)
    shape = _shape(call, source.y, weight)
    if _runs_own(shape):
        try:
            return _own_conv(call, source, weight, RAW).y
        except primitives.COMPILE_ERRORS as error:
            _refuse(shape, error)
    return library.site_rebuild(_PRIMITIVES, call, source, weight)


def site_infer(call: SiteCall, x: Tensor, params: SiteParams, residual: Tensor | None, relu: bool) -> Tensor:
    """``act(bn(conv(x)) + residual)`` with running statistics, in one kernel where ours runs.

    Equivalent to: ``F.relu(F.batch_norm(F.conv2d(x, ...), ..., training=False) + residual)``
    """
    shape = _shape(call, x, params.weight)
    moments = library.eval_moments(_PRIMITIVES, call, params, x.dtype)
    if _runs_own(shape):
        dense = None if residual is None else _dense(residual)
        try:
            return _own_conv(call, Source("plain", x), params.weight, Epilogue("activation", moments, dense, relu)).y
        except primitives.COMPILE_ERRORS as error:
            _refuse(shape, error)
    y = library.site_conv(_PRIMITIVES, call, x, params.weight)
    return primitives.bn_apply(y, moments, residual, None, 1, 0, relu)


def _epilogue(
    call: SiteCall, source: Source, x: Tensor | None, mask: Tensor | None, dskip: Tensor | None
) -> DgradEpilogue:
    """What the gradient of the source needs before it is stored."""
    dskip = None if dskip is None else _dense(dskip)
    if source.kind == "plain":
        return DgradEpilogue("plain", dskip, skip_stride=call.hand_stride)
    if source.kind == "pending":
        return DgradEpilogue("pending", None, source.y, source.moments, relu=source.relu)
    projected = source.residual_moments is not None
    return DgradEpilogue(
        "join",
        dskip,
        source.y,
        source.moments,
        (x if mask is None else mask) if source.relu else None,
        residual_y=source.residual if projected else None,
        residual_moments=source.residual_moments,
        skip_stride=call.hand_stride,
    )


def _own_backward(
    call: SiteCall,
    source: Source,
    x: Tensor | None,
    weight: Tensor,
    gradient: Gradient,
    dskip: Tensor | None,
    needs: tuple[bool, bool],
    mask: Tensor | None,
) -> SiteGrads:
    src = _input(source)
    geometry = Geometry.of(src, weight, call.stride, call.padding, call.dilation)
    dx = sums = residual = residual_sums = dw = None
    if needs[0]:
        filters = pack.pack_weight(weight, gradient.g.dtype)
        dx, sums = conv_dgrad(gradient, filters, geometry, _epilogue(call, source, x, mask, dskip))
        if source.kind == "join":
            residual = library.residual_gradient(dx, source)
        if sums is not None and source.residual_moments is not None:
            # a copy: the outputs of an operator must not share memory
            sums, residual_sums = sums[:2].contiguous(), sums[2:].clone()
    if needs[1]:
        if source.kind == "pending":
            prologue = Prologue("pending", source.moments, source.relu)
            dw = conv_wgrad(gradient, src, geometry, weight, prologue)
        elif x is None:
            raise ValueError(f"site_backward: x: expected the stored input of a {source.kind} source, got None")
        elif pack.packs_image(geometry):
            packed, _ = pack.packed_geometry(geometry)
            dw = conv_wgrad(gradient, pack.pack_image(_dense(x), geometry), packed, weight)
        else:
            dw = conv_wgrad(gradient, src if source.kind == "plain" else _dense(x), geometry, weight)
    return SiteGrads(dx, sums, residual, residual_sums, dw)


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
    attribute(weight)
    shape = _shape(call, source.y, weight)
    if _runs_own(shape):
        gradient = Gradient(_dense(g), y, moments, sums.contiguous() if call.training else None, call.relu)
        try:
            return _own_backward(call, source, x, weight, gradient, dskip, needs, mask)
        except primitives.COMPILE_ERRORS as error:
            _refuse(shape, error)
    return library.site_backward(_PRIMITIVES, call, source, x, weight, y, moments, g, sums, dskip, needs)
