"""Inputs of the convolution kernels, and the numerics law over their results.

What a kernel stores is held against `reference` in float64; what it reduces (statistics, sums) against the reduction
of the tensors *as stored*, at float32's precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from resnet_fused import numerics, reference
from resnet_fused.kernels import conv_dgrad, conv_fwd, conv_wgrad, pack, tiles
from resnet_fused.kernels.conv_fwd import Epilogue
from resnet_fused.kernels.geometry import Geometry, Prologue, loadable, new_mask, precision
from resnet_fused.kernels.reduce import channels_last
from resnet_fused.kernels.target import Target
from tests.emulation.bn_samples import Results, Sample, draw, some_moments, to_format, with_specials

Pair = tuple[int, int]
Given = Mapping[str, Any]
Pick = Callable[[tiles.Problem, Target], tiles.Tile]
Reduce = Callable[[Given, Results], Results]
KERNELS = types.SimpleNamespace(
    conv_fwd=conv_fwd.conv_fwd, conv_dgrad=conv_dgrad.conv_dgrad, conv_wgrad=conv_wgrad.conv_wgrad
)


class Conv(NamedTuple):
    """``F.conv2d`` of ``(n, c, h, w)`` into ``k`` channels; a single number stands for both sides."""

    n: int
    c: int
    h: int
    w: int
    k: int
    side: int | Pair
    stride: int | Pair = 1
    padding: int | Pair = 0
    dilation: int | Pair = 1

    @property
    def static(self) -> tuple[Pair, Pair, Pair]:
        """Stride, padding and dilation."""
        return tuple(v if isinstance(v, tuple) else (v, v) for v in self[6:])  # type: ignore[return-value]

    @property
    def x(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    def weight(self, dtype: torch.dtype) -> Tensor:
        sides = self.side if isinstance(self.side, tuple) else (self.side, self.side)
        return (draw(self.k, self.c, *sides, seed=50) / (self.c * sides[0] * sides[1]) ** 0.5).to(dtype)

    @property
    def y(self) -> torch.Size:
        x, weight = torch.empty(self.x, device="meta"), self.weight(torch.float32).to("meta")
        return reference.conv_fwd(x, weight, *self.static, 1).shape


@dataclasses.dataclass(frozen=True)
class ConvSample(Sample):
    """A `Sample` whose results include reductions: ``reduce(inputs, results)`` names and repeats them."""

    reduce: Reduce = lambda given, stored: {}

    def broken(self, got: Results) -> list[str]:
        """What of ``got`` breaks the numerics law."""

        def again(convert: Callable[[Tensor], Tensor]) -> Results:
            given = {k: None if v is None else convert(v) for k, v in self.inputs.items()}
            return self.reduce(given, {k: convert(v) for k, v in got.items()})

        eager = [again(lambda t, f=f: to_format(f)(t).float()) for f in (torch.contiguous_format, torch.channels_last)]
        ref = again(lambda t: t.double())
        reduced = {name: t for name, t in got.items() if name in ref}
        verdicts = numerics.judge_all(reduced, ref, eager, torch.float32)
        stored = super().broken({name: t for name, t in got.items() if name not in ref})
        return [*stored, *(str(verdict) for verdict in verdicts if not verdict.passed)]


@contextlib.contextmanager
def chosen(pick: Pick) -> Iterator[list[tuple[tiles.Problem, tiles.Tile]]]:
    """Let ``pick`` choose every convolution's tile in the block; yields what was asked and chosen."""
    asked: list[tuple[tiles.Problem, tiles.Tile]] = []

    def choose(problem: tiles.Problem, target: Target) -> tiles.Tile:
        asked.append((problem, pick(problem, target)))
        return asked[-1][1]

    with contextlib.ExitStack() as stack:
        for module in (conv_fwd, conv_dgrad, conv_wgrad):
            stack.enter_context(mock.patch.object(module, "choose", choose))
        yield asked


def in_parts(split: int) -> Pick:
    """The rules' tile, with the depth in ``split`` parts."""
    return lambda problem, target: dataclasses.replace(tiles.choose(problem, target), split=split)


def operand(t: Tensor) -> Tensor:
    """``t`` as a tensor core takes it: of TF32, the lower 13 bits are ignored, and Triton rounds nothing before."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32) if precision(t.dtype) == "tf32" else t


def launched(conv: Conv, x: Tensor, weight: Tensor, packs: bool) -> tuple[Tensor, Tensor | None, Geometry]:
    """``x``, a packed weight in its dtype and the geometry, as a site hands them to the kernels."""
    x = loadable(x)
    geometry = Geometry.of(x, weight, *conv.static)
    if not (packs and pack.packs_image(geometry)):
        return x, pack.pack_weight(weight, x.dtype), geometry
    packed, taps = pack.packed_geometry(geometry)
    return pack.pack_image(x, geometry), pack.pack_weight(weight, x.dtype, taps), packed


def dense(given: Given) -> dict[str, Any]:
    """The activations channels_last; the weight, and an ``x`` that is stepped over, as they are."""
    kept = ("weight", "x")
    return {k: channels_last(t) if t is not None and t.ndim == 4 and k not in kept else t for k, t in given.items()}


def source_inputs(conv: Conv, dtype: torch.dtype, kind: str, specials: bool, step: int = 1) -> dict[str, Tensor | None]:
    """``x`` and what a pending source or a join with an identity or a projection needs.

    Every ``step``-th pixel of ``x`` is convolved.
    """
    x = draw(conv.n, conv.c, (conv.h - 1) * step + 1, (conv.w - 1) * step + 1, dtype=dtype)
    given: dict[str, Tensor | None] = {"x": with_specials(x) if specials else x}
    joins = kind in ("identity", "projection")
    given["moments"] = None if kind == "plain" else some_moments(conv.c)
    given["residual"] = draw(*conv.x, seed=1, dtype=dtype) if joins else None
    given["residual_moments"] = some_moments(conv.c, 1) if kind == "projection" else None
    return given


def activation(given: Given, relu: bool) -> Tensor:
    if given["moments"] is None:
        return given["x"]
    return reference.bn_apply(given["x"], given["moments"], given["residual"], given["residual_moments"], 1, 0, relu)


def bits(out: Tensor) -> Tensor:
    """Where a ReLU's output passed, eight channels to a byte: what a join stores for the backward."""
    n, c, h, w = out.shape
    passed = (~(out <= 0)).permute(0, 2, 3, 1).reshape(n, h, w, c // 8, 8)
    return (passed * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)


def _statistics(merged: tuple[Tensor, Tensor, Tensor]) -> Results:
    count, mean, m2 = merged
    return {"count": count, "mean": mean, "variance": m2 / count}


def forward(
    conv: Conv,
    dtype: torch.dtype,
    source: str = "plain",
    epilogue: str = "raw",
    relu: bool = True,
    specials: bool = False,
    mean: float = 0.0,
    deviation: float = 1.0,
    step: int = 1,
) -> ConvSample:
    """``source``: plain, pending, identity, projection; ``epilogue``: raw, statistics, activation, residual.

    ``relu`` is that of the source and of the epilogue; ``x`` is ``mean + deviation * noise``, see `source_inputs`.
    """
    evaluates, joins = epilogue in ("activation", "residual"), source in ("identity", "projection")

    def expected(given: Given) -> Results:
        given = {**given, "x": given["x"][:, :, ::step, ::step]}
        act = activation(given, relu)
        y = reference.conv_fwd(operand(act), operand(given["weight"]), *conv.static, 1)
        if evaluates:
            y = reference.bn_apply(y, given["y_moments"], given["y_residual"], None, 1, 0, relu)
        return {"y": y, "out": act} if joins else {"y": y}

    def call(engine: Any, given: Given) -> Results:
        if engine is reference:
            return expected(given)
        x, weight, geometry = launched(conv, given["x"][:, :, ::step, ::step], given["weight"], source == "plain")
        given = dense(given)
        shortcut = (given["residual"], given["residual_moments"])
        mask = new_mask(x) if joins and relu else None
        before = Prologue("join" if joins else source, given["moments"], relu, *shortcut, mask)
        after = Epilogue("activation" if evaluates else epilogue, given["y_moments"], given["y_residual"], relu)
        y, partials, out = engine.conv_fwd(x, weight, geometry, before, after)
        assert (partials is not None, out is not None) == (epilogue == "statistics", joins)
        results = {"y": y, "out": out} if joins else {"y": y}
        if mask is not None:
            results["mask"] = mask.float()
        return results if partials is None else {**results, **_statistics(reference.merge_partials(partials.double()))}

    def reduce(_: Given, stored: Results) -> Results:
        again = {"mask": bits(stored["out"]).to(stored["mask"].dtype)} if "mask" in stored else {}
        if epilogue != "statistics":
            return again
        return {**again, **_statistics(reference.merge_partials(reference.bn_stats(stored["y"])))}

    inputs = source_inputs(conv, dtype, source, specials, step)
    if mean:
        inputs["x"] = (mean + deviation * draw(*conv.x)).to(dtype)
    inputs["weight"] = conv.weight(dtype)
    inputs["y_moments"] = some_moments(conv.k, 2) if evaluates else None
    inputs["y_residual"] = draw(*conv.y, seed=2, dtype=dtype) if epilogue == "residual" else None
    return ConvSample(call, inputs, dtype, reduce)
