"""Whether a site's convolution on the CPU runs as our own packed matrix products or as the library's, and why.

``own``: products of ``csrc/cpu/gemm.h``, of float32 and bfloat16; in float32, but for bfloat16 on a machine that has
instructions for its products (AVX512-BF16, AMX). Batch norm and ReLU, or the gradient's affine, are applied while an
operand is packed; statistics, masks and sums are made while a tile is stored: a site makes no pass of its own over an
activation, and neither a normalised activation nor ``dy`` is ever stored. ``library``: oneDNN's convolution with the
engine's passes around it. Results differ by rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import plan, winners
from ..calls import SiteCall

OWN_ALL, OWN_NONE = 3, 0  # bits of the ops' `packed`: our products, and Winograd's among them

_CPU = torch.device("cpu")
_DTYPES = (torch.float32, torch.bfloat16)
_WIDE = ("avx2", "avx512", "avx512_bf16", "amx")  # instruction sets for which the rules take our products
_FEW_POINTS = 16  # of a batch of one: its weight is most of what moves
_SHORT_PATCH, _FEW_OUTPUTS = 32, 16  # a CIFAR network's stem, where ``csrc/cpu/narrow.h`` has no kernel for it
_isa: Callable[[], str] | None = None


def register(name_of: Callable[[], str]) -> None:
    """Take the function that names the instruction set in use."""
    global _isa
    _isa = name_of


def isa() -> str:
    """The instruction set in use; "none" without the library."""
    return "none" if _isa is None else _isa()


def impossible(shape: plan.ConvShape) -> str | None:
    """Why our products cannot run the shape, or None; ``can_pack`` of the C++ library."""
    if shape.dtype not in _DTYPES:
        return f"our products are of float32 and bfloat16, not {str(shape.dtype).removeprefix('torch.')}"
    if shape.groups != 1:
        return f"{shape.groups} groups"
    if shape.dilation != (1, 1):
        return f"a dilation of {shape.dilation[0]}"
    if any(taps < step for taps, step in zip(shape.filter, shape.stride, strict=True)):
        return "it steps over pixels"
    return None


def variant(shape: plan.ConvShape) -> plan.Variant:
    """Who runs a site that the projection ops do not."""
    size, filters = (shape.n, shape.c, shape.h, shape.w), (shape.k, shape.c, *shape.filter)
    if shape.groups == 1 and plan.is_small("cpu", size, filters, shape.dtype):
        return plan.Variant(plan.PRODUCT, "so small that it runs as one matrix product in its site's op")
    if reason := impossible(shape):
        return plan.Variant(plan.LIBRARY, reason)
    if chosen := plan.decided(shape, "cpu"):
        return chosen
    if isa() not in _WIDE:
        return plan.Variant(plan.LIBRARY, "our products are for AVX2 and AVX-512")
    if shape.n == 1 and (points := math.prod(shape.out)) <= _FEW_POINTS:
        return plan.Variant(plan.LIBRARY, f"{points} points of one image: packing the weight costs more")
    narrow = isa() == "avx512" or (isa() in _WIDE[2:] and shape.dtype == torch.float32)
    if not narrow and shape.c * shape.filter[0] * shape.filter[1] < _SHORT_PATCH and shape.k <= _FEW_OUTPUTS:
        return plan.Variant(plan.LIBRARY, f"{shape.c} channels and {shape.k} outputs fill no register tile")
    return plan.Variant(plan.OWN, "batch norm and ReLU while packing, statistics and masks while storing")


def packed(call: SiteCall, x: Tensor, weight: Tensor) -> int:
    """Bits for an op's ``packed``. Sizes that torch.compile keeps open were not measured: the rules decide."""
    if x.dtype not in _DTYPES:
        return OWN_NONE
    winners.ready_for(_CPU)
    if torch.compiler.is_compiling():
        known = torch.fx.experimental.symbolic_shapes.has_static_value
        if not all(known(size) for size in x.shape):
            return _by_rule()
    convolution = (call.stride, call.padding, call.dilation, call.groups)
    return _packed(convolution, tuple(x.shape), tuple(weight.shape), x.dtype)


def _by_rule() -> int:
    return OWN_ALL if isa() in _WIDE and plan.forced_name() != plan.LIBRARY else OWN_NONE


_by_rule._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see `winners.ready`


def _packed(convolution: tuple[Any, ...], size: tuple[int, ...], filters: tuple[int, ...], dtype: torch.dtype) -> int:
    return _decide(winners.token, plan.forced_name(), torch.get_num_threads(), isa(), convolution, size, filters, dtype)


_packed._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see `winners.ready`


@functools.lru_cache(maxsize=4096)
def _decide(
    _token: str,
    _forced: str | None,
    _threads: int,
    _isa_name: str,
    convolution: tuple[Any, ...],
    size: tuple[int, ...],
    filters: tuple[int, ...],
    dtype: torch.dtype,
) -> int:
    """The first four are what a decision depends on besides the shape."""
    shape = plan.shape_of("cpu", convolution, False, size, (0, 0, 0, 0), filters, dtype, _CPU)
    return OWN_ALL if variant(shape).name == plan.OWN else OWN_NONE
