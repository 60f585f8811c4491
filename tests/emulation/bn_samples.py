"""Inputs of the batch-norm and pool kernels, and the numerics law over their results.

A sample calls one primitive of an engine: of `reference`, the specification, or of `KERNELS`, the Triton launchers.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from resnet_fused import numerics, reference
from resnet_fused.kernels import bn_apply, bn_bwd, bn_finalize, bn_stats, join_bwd, pool, reduce

Results = dict[str, Tensor]
EPS = 1e-5
SHAPES = ((2, 3, 5, 7), (3, 5, 1, 1), (2, 24, 9, 8), (1, 72, 11, 13))
KERNELS = types.SimpleNamespace(
    **{name: getattr(bn_bwd, name) for name in vars(bn_bwd) if name.startswith("bn_bwd_") and name != "bn_bwd"},
    bn_apply=bn_apply.bn_apply,
    bn_eval_moments=bn_finalize.bn_eval_moments,
    bn_finalize=bn_finalize.bn_finalize,
    bn_stats=bn_stats.bn_stats,
    join_bwd_reduce=join_bwd.join_bwd_reduce,
    merge_partials=lambda partials: bn_stats.merge_partials(partials)[0],
    pool_apply=pool.pool_apply,
    pool_bwd=pool.pool_bwd,
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call. ``call(engine, inputs)`` names its results; activations are the four-dimensional inputs."""

    call: Callable[[Any, Mapping[str, Any]], Results]
    inputs: Mapping[str, Tensor | None]
    dtype: torch.dtype

    def run(self, engine: Any, convert: Callable[[Tensor], Tensor] = torch.clone) -> Results:
        """The results of ``engine`` on converted inputs, which the call may overwrite."""
        return self.call(engine, {k: None if v is None else convert(v) for k, v in self.inputs.items()})

    def broken(self, got: Results) -> list[str]:
        """What of ``got`` breaks the numerics law."""
        ref = self.run(reference, lambda t: t.double() if t.is_floating_point() else t.clone())
        eager = [self.run(reference, to_format(f)) for f in (torch.contiguous_format, torch.channels_last)]
        activations = {name for name, t in ref.items() if t.ndim == 4}
        verdicts = []
        for chosen, dtype in ((activations, self.dtype), (set(ref) - activations, torch.float32)):
            parts = [{k: t for k, t in results.items() if k in chosen} for results in (got, ref, *eager)]
            wide = {k: t.double() for k, t in parts[1].items()}
            verdicts += numerics.judge_all(parts[0], wide, parts[2:], dtype)
        return [str(verdict) for verdict in verdicts if not verdict.passed]


def to_format(memory_format: torch.memory_format) -> Callable[[Tensor], Tensor]:
    """A converter that copies, activations to ``memory_format``."""
    return lambda t: t.clone(memory_format=memory_format) if t.ndim == 4 else t.clone()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some_moments(channels: int, seed: int = 0) -> Tensor:
    """Moments ``(5, C)``; a third of the scales is negative and, above three channels, one is zero."""
    mean, shift = draw(2, channels, seed=seed + 100)
    rstd = draw(channels, seed=seed + 101).abs() + 0.5
    scale = rstd * torch.where(torch.arange(channels) % 3 == 1, -1.5, 0.75)
    scale[3:4] = 0.0
    return torch.stack([mean, rstd, scale, shift, torch.full_like(mean, 1 / 64)])


def with_specials(t: Tensor) -> Tensor:
    """A copy with a NaN and both infinities in the first pixels."""
    t = t.clone(memory_format=torch.channels_last)
    flat = t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])
    for row, value in enumerate(("nan", "inf", "-inf")):
        flat[row % len(flat), row % flat.shape[1]] = float(value)
    return flat.view(t.shape[0], *t.shape[2:], t.shape[1]).permute(0, 3, 1, 2)


def stats(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 3.0, deviation: float = 1.0) -> Sample:
    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        count, middle, m2 = engine.merge_partials(engine.bn_stats(given["y"]))
        return {"count": count, "mean": middle, "variance": m2 / count}

    return Sample(call, {"y": (draw(*shape) * deviation + mean).to(dtype)}, dtype)


def finalize(channels: int, partials: int = 5, momentum: float | None = 0.1, drop: tuple[str, ...] = ()) -> Sample:
    """Moments and buffers of partials of ragged counts; ``drop`` names the inputs that are None."""

    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        names = ("partials", "weight", "bias", "conv_bias", "running_mean", "running_var", "counter")
        moments = engine.bn_finalize(*(given[name] for name in names), momentum, EPS)
        buffers = {name: given[name] for name in names[4:] if given[name] is not None}
        return {"moments": moments, **buffers}

    counts = (torch.arange(partials) * 7 % 5).float()
    parts = torch.stack(
        [counts[:, None].expand(-1, channels), draw(partials, channels), draw(partials, channels, seed=1).square()], 1
    )
    parts[:, 1:] *= (counts > 0)[:, None, None]
    parts[:, 2] *= (counts > 1)[:, None]
    inputs: dict[str, Tensor | None] = {"partials": parts, "counter": torch.tensor(4)}
    for seed, name in enumerate(("weight", "bias", "conv_bias", "running_mean", "running_var")):
        inputs[name] = draw(channels, seed=10 + seed).abs()
    return Sample(call, {k: None if k in drop else v for k, v in inputs.items()}, torch.float32)


def eval_moments(channels: int, drop: tuple[str, ...] = ()) -> Sample:
    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        names = ("running_mean", "running_var", "weight", "bias", "conv_bias")
        return {"moments": engine.bn_eval_moments(*(given[n] for n in names), EPS, given["running_mean"].dtype)}

    inputs: dict[str, Tensor | None] = {"running_var": draw(channels, seed=9).abs()}
    for seed, name in enumerate(("running_mean", "weight", "bias", "conv_bias")):
        inputs[name] = None if name in drop else draw(channels, seed=seed)
    return Sample(call, inputs, torch.float32)


def apply(
    shape: tuple[int, ...], dtype: torch.dtype, shortcut: str = "none", relu: bool = True, specials: bool = False
) -> Sample:
    """``shortcut``: none, plain, projection, or option_a (stride 2, a third of the channels, two in front)."""
    n, c, p, q = shape
    y = draw(*shape, dtype=dtype)
    inputs: dict[str, Tensor | None] = {"y": with_specials(y) if specials else y, "moments": some_moments(c)}
    inputs["residual"], inputs["residual_moments"] = None, None
    if shortcut == "option_a":
        inputs["residual"] = draw(n, max(1, c // 3), 2 * p, 2 * q - 1, seed=1, dtype=dtype)
    elif shortcut != "none":
        inputs["residual"] = draw(*shape, seed=1, dtype=dtype)
        inputs["residual_moments"] = some_moments(c, 1) if shortcut == "projection" else None
    stride, offset = (2, 2) if shortcut == "option_a" else (1, 0)

    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        names = ("y", "moments", "residual", "residual_moments")
        return {"out": engine.bn_apply(*(given[name] for name in names), stride, offset, relu)}

    return Sample(call, inputs, dtype)


def bwd_reduce(
    shape: tuple[int, ...], dtype: torch.dtype, relu: bool = True, rebuild: bool = False, specials: bool = False
) -> Sample:
    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        arguments = (given["dout"], given["y"], given["moments"], relu)
        if rebuild:
            return dict(zip(("sums", "act"), engine.bn_bwd_reduce_rebuild(*arguments)))
        return {"sums": engine.bn_bwd_reduce(*arguments)}

    y = draw(*shape, seed=1, dtype=dtype)
    y = with_specials(y) if specials else y
    return Sample(call, {"dout": draw(*shape, dtype=dtype), "y": y, "moments": some_moments(shape[1])}, dtype)


def join(
    shape: tuple[int, ...], dtype: torch.dtype, drop: tuple[str, ...] = (), relu: bool = True, specials: bool = False
) -> Sample:
    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        names = ("dout", "dskip", "out", "y", "moments", "residual_y", "residual_moments")
        results = engine.join_bwd_reduce(*(given[name] for name in names))
        named = dict(zip(("g", "sums", "residual_sums"), results))
        return {name: t for name, t in named.items() if t.numel()}

    inputs: dict[str, Tensor | None] = {
        "moments": some_moments(shape[1]),
        "residual_moments": some_moments(shape[1], 1),
    }
    for seed, name in enumerate(("dout", "dskip", "y", "residual_y")):
        inputs[name] = draw(*shape, seed=seed, dtype=dtype)
    out = draw(*shape, seed=7, dtype=dtype)
    out = (with_specials(out) if specials else out) if relu else None
    inputs["out"] = None if out is None else torch.where(out <= 0, 0.0, out).to(dtype)
    return Sample(call, {k: None if k in drop else v for k, v in inputs.items()}, dtype)


def bwd_finalize(channels: int, training: bool = True) -> Sample:
    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        return {"coef": engine.bn_bwd_finalize(given["sums"], given["moments"], training)}

    return Sample(call, {"sums": draw(2, channels), "moments": some_moments(channels)}, torch.float32)


def bwd_apply(
    shape: tuple[int, ...], dtype: torch.dtype, relu: bool = True, training: bool = True, specials: bool = False
) -> Sample:
    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        return {"dy": engine.bn_bwd_apply(*(given[name] for name in ("g", "y", "moments", "coef")), relu)}

    y = draw(*shape, seed=1, dtype=dtype)
    inputs = {"g": draw(*shape, dtype=dtype), "y": with_specials(y) if specials else y}
    inputs.update(moments=some_moments(shape[1]), coef=draw(3 if training else 1, shape[1], seed=2))
    return Sample(call, inputs, dtype)


def pooling(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    window: tuple[reference.Pair, ...] = ((3, 3), (2, 2), (1, 1)),
    relu: bool = True,
    specials: bool = False,
    backward: bool = False,
) -> Sample:
    """Small integers and an exact affine: many ties, and every dtype finds the same winner."""

    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        if backward:
            results = engine.pool_bwd(given["dout"], given["y"], given["moments"], *window, relu)
            return dict(zip(("g", "sums"), results))
        return {"out": engine.pool_apply(given["y"], given["moments"], *window, relu)}

    y = (draw(*shape) * 2).round().to(dtype)
    channels = torch.arange(shape[1])
    moments = torch.stack([channels % 3 - 1, *(channels * 0 + s for s in (2, 2, 0, 0))]).float()
    moments[1] /= 8
    moments[2, 1::3] = -1.0
    moments[3] = 0.5 * (channels % 2)
    inputs = {"y": with_specials(y) if specials else y, "moments": moments}
    if backward:
        outputs = reference.pool_apply(inputs["y"], moments, *window, relu).shape
        inputs["dout"] = (draw(*outputs, seed=3) * 3).round().to(dtype)
    return Sample(call, inputs, dtype)


def sum_of_rows(rows: int, *shape: int) -> Sample:
    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        ours = engine is KERNELS
        return {"sum": reduce.sum_rows(given["partials"]) if ours else given["partials"].sum(0)}

    return Sample(call, {"partials": draw(rows, *shape)}, torch.float32)


def merge(rows: int, channels: int) -> Sample:
    def call(engine: Any, given: Mapping[str, Any]) -> Results:
        return dict(zip(("count", "mean", "m2"), engine.merge_partials(given["partials"])))

    return Sample(call, {"partials": finalize(channels, rows).inputs["partials"]}, torch.float32)
