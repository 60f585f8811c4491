"""Inputs of the two backward convolutions; see `conv_samples`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused import reference
from resnet_fused.kernels.conv_dgrad import DgradEpilogue
from resnet_fused.kernels.geometry import Prologue
from resnet_fused.kernels.gradient import Gradient
from tests.emulation.bn_samples import Results, draw, some_moments, with_specials
from tests.emulation.conv_samples import (
    Conv,
    ConvSample,
    Given,
    activation,
    bits,
    dense,
    launched,
    operand,
    source_inputs,
)


def _gradient(conv: Conv, dtype: torch.dtype, norm: str, specials: bool) -> dict[str, Tensor | None]:
    """``g``, and ``y``, ``moments``, ``sums`` as ``norm`` (none, batch, running) needs them."""
    g, y = draw(*conv.y, seed=3, dtype=dtype), draw(*conv.y, seed=4, dtype=dtype)
    if specials:
        y = with_specials(y)
        g[-1, 0, -1, -1] = float("nan")
    normed = norm != "none"
    return {
        "g": g,
        "y": y if normed else None,
        "y_moments": some_moments(conv.k, 2) if normed else None,
        "y_sums": draw(2, conv.k, seed=5) * 4 if norm == "batch" else None,
    }


def _dy(given: Given, mask: bool) -> Tensor:
    """The gradient of ``y``, in steps."""
    moments = given["y_moments"]
    if moments is None:
        return given["g"]
    training = given["y_sums"] is not None
    coef = reference.bn_bwd_finalize(given["y_sums"] if training else moments[:2], moments, training)
    return reference.bn_bwd_apply(given["g"], given["y"], moments, coef, mask)


def _launched_gradient(given: Given, mask: bool) -> Gradient:
    given = dense(given)
    return Gradient(given["g"], given["y"], given["y_moments"], given["y_sums"], mask)


def input_gradient(
    conv: Conv,
    dtype: torch.dtype,
    norm: str = "batch",
    epilogue: str = "plain",
    mask: bool = True,
    dskip: bool = False,
    projection: bool = False,
    relu: bool = True,
    specials: bool = False,
    skip_stride: int = 1,
    packed: bool = False,
) -> ConvSample:
    """``norm``: none, batch, running; ``epilogue``: plain, pending, join; ``mask``: by the site's own z.

    ``packed``: the join is given its ReLU's mask as bits instead of ``out``.
    """

    def expected(given: Given) -> Results:
        like = given["g"].new_zeros(conv.x)
        if dskip:
            whole = torch.zeros_like(like)
            whole[:, :, ::skip_stride, ::skip_stride] = given["dskip"]
            given = {**given, "dskip": whole}
        operands = (operand(_dy(given, mask)), like, operand(given["weight"]))
        dx, _ = reference.conv_bwd(*operands, *conv.static, 1, (True, False))
        assert dx is not None
        if epilogue == "join":
            names = ("dskip", "out", "x", "moments")
            return {"dx": reference.join_bwd_reduce(dx, *(given[n] for n in names), None, None)[0]}
        if epilogue == "pending":
            ones = torch.ones_like(given["moments"][:1])
            return {"dx": reference.bn_bwd_apply(dx, given["x"], given["moments"], ones, relu)}
        return {"dx": dx if given["dskip"] is None else dx + given["dskip"]}

    def call(engine: Any, given: Given) -> Results:
        if engine is reference:
            return expected(given)
        given = dense(given)
        x, weight, geometry = launched(conv, given["x"], given["weight"], False)
        given = {**given, "x": x}
        if epilogue == "plain":
            after = DgradEpilogue("plain", given["dskip"], skip_stride=skip_stride)
        else:
            names = ("dskip", "x", "moments", "out")
            projected = (given["residual"], given["residual_moments"])
            after = DgradEpilogue(epilogue, *(given[n] for n in names), relu, *projected, skip_stride)
            after = after._replace(out=bits(given["out"])) if packed else after
        dx, sums = engine.conv_dgrad(_launched_gradient(given, mask), weight, geometry, after)
        assert dx.shape == x.shape
        return {"dx": dx} if sums is None else {"dx": dx, "sums": sums}

    def reduce(given: Given, stored: Results) -> Results:
        if epilogue == "plain":
            return {}
        names = ("x", "moments", "residual", "residual_moments")
        _, *sums = reference.join_bwd_reduce(stored["dx"], None, None, *(given[n] for n in names))
        return {"sums": torch.cat(sums) if projection else sums[0]}

    inputs = {**_gradient(conv, dtype, norm, specials), "weight": conv.weight(dtype)}
    kind = "projection" if projection else "plain" if epilogue == "plain" else "pending"
    inputs.update(source_inputs(conv, dtype, kind, specials))
    sides = (-(-conv.h // skip_stride), -(-conv.w // skip_stride))
    inputs["dskip"] = draw(conv.n, conv.c, *sides, seed=6, dtype=dtype) if dskip else None
    inputs["out"] = None
    if epilogue == "join" and relu:
        out = draw(*conv.x, seed=7, dtype=dtype)
        out = with_specials(out) if specials else out
        inputs["out"] = torch.where(out <= 0, 0.0, out).to(dtype)
    return ConvSample(call, inputs, dtype, reduce)


def weight_gradient(
    conv: Conv,
    dtype: torch.dtype,
    norm: str = "batch",
    source: str = "plain",
    mask: bool = True,
    relu: bool = True,
    master: torch.dtype | None = None,
    specials: bool = False,
    step: int = 1,
) -> ConvSample:
    """``norm`` as in `input_gradient`; ``source``: plain, pending; ``master``: the weight's dtype under autocast.

    ``step`` as in `source_inputs`.
    """

    def expected(given: Given) -> Results:
        given = {**given, "x": given["x"][:, :, ::step, ::step]}
        act, weight = activation(given, relu), given["weight"].to(given["x"].dtype)
        _, dw = reference.conv_bwd(operand(_dy(given, mask)), operand(act), weight, *conv.static, 1, (False, True))
        assert dw is not None
        return {"dw": dw}

    def call(engine: Any, given: Given) -> Results:
        if engine is reference:
            return expected(given)
        x, _, geometry = launched(conv, given["x"][:, :, ::step, ::step], given["weight"], source == "plain")
        before = Prologue(source, given["moments"], relu)
        dw = engine.conv_wgrad(_launched_gradient(given, mask), x, geometry, given["weight"], before)
        assert (dw.dtype, dw.stride()) == (given["weight"].dtype, given["weight"].stride())
        return {"dw": dw}

    inputs = {**_gradient(conv, dtype, norm, specials), **source_inputs(conv, dtype, source, specials, step)}
    inputs["weight"] = conv.weight(master or dtype)
    return ConvSample(call, inputs, dtype)
