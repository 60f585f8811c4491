"""The tiles that `tune` may try, on a handful of ResNet-50's convolutions: every one has to compile and fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import conv_dgrad, conv_fwd, conv_wgrad
from ..kernels import target as targets
from ..kernels.conv_dgrad import DgradEpilogue
from ..kernels.conv_fwd import Epilogue
from ..kernels.geometry import Geometry, Prologue
from ..kernels.gradient import Gradient
from ..kernels.tiles import Problem, Tile, candidates

# Input channels, output channels, kernel, stride, pixels: a bottleneck's three convolutions in the third stage,
# its strided 3x3, and a narrow 3x3 of the first stage.
CONVOLUTIONS = (
    (1024, 256, 1, 1, 14),
    (256, 256, 3, 1, 14),
    (256, 1024, 1, 1, 14),
    (256, 256, 3, 2, 28),
    (64, 64, 3, 1, 56),
)
_BATCH = 256


def _images(channels: int, pixels: int, dtype: torch.dtype) -> Tensor:
    images = torch.empty(_BATCH, channels, pixels, pixels, device="meta", dtype=dtype)
    return images.to(memory_format=torch.channels_last)


def _table(rows: int, channels: int) -> Tensor:
    return torch.empty(rows, channels, device="meta")


def _calls(dtype: torch.dtype) -> Iterator[tuple[Problem, Callable[[Tile], Any]]]:
    """Every convolution's three products as a chain runs them: its problem, and its launcher given a tile."""
    for c, k, side, stride, pixels in CONVOLUTIONS:
        weight = torch.empty(k, c, side, side, device="meta", dtype=dtype).to(memory_format=torch.channels_last)
        filters = weight.permute(0, 2, 3, 1)
        x = _images(c, pixels, dtype)
        padding = (side // 2, side // 2)
        geometry = Geometry.of(x, weight, (stride, stride), padding, (1, 1))
        y = _images(k, geometry.p, dtype)
        # A 1x1 that narrows opens a block: its source is a join.
        joins = side == 1 and c > k
        source = Prologue("join" if joins else "pending", _table(5, c), True, x if joins else None)
        kept = Prologue() if joins else source
        gradient = Gradient(y, y, _table(5, k), _table(2, k), True)
        closing = DgradEpilogue("pending", prev_y=x, prev_moments=_table(5, c))
        if joins:
            closing = closing._replace(kind="join", dskip=x, out=x)
        backward = (geometry, gradient)
        forward = partial(conv_fwd.conv_fwd, x, filters, geometry, source, Epilogue("statistics"))
        yield conv_fwd.problem(geometry, dtype, source), forward
        yield conv_dgrad.problem(*backward), partial(conv_dgrad.conv_dgrad, gradient, filters, geometry, closing)
        yield conv_wgrad.problem(*backward), partial(conv_wgrad.conv_wgrad, gradient, x, geometry, weight, kept)


def launch_candidates(dtype: torch.dtype, target: str) -> None:
    """Launch every candidate of every convolution on meta tensors."""
    for problem, call in _calls(dtype):
        for tile in candidates(problem, targets.named(target)):
            call(tile)
