"""Inputs and runs of every primitive, for the tests of the CPU engine: each run takes an engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from resnet_fused import reference

Inputs = dict[str, Any]
Run = Callable[[ModuleType, Inputs], dict[str, Tensor]]
POOLS = [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (0, 1)), ((1, 1), (2, 2), (0, 0))]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Activations in ``dtype`` and per-channel tables in opmath, all NCHW-contiguous."""
    n, c, h, w = shape
    wide = reference.opmath(dtype)
    rng = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    y = (randn(*shape) * 2 + randn(c)[:, None, None]).to(dtype)
    inputs: Inputs = {"y": y}
    for name in ("dout", "dskip", "residual"):
        inputs[name] = randn(*shape).to(dtype)
    inputs["out"] = randn(*shape).clamp(min=0).to(dtype)
    inputs["option_a"] = randn(n, (c + 1) // 2, 2 * h, 2 * w - 1).to(dtype)
    for name in ("moments", "residual_moments"):
        rstd = randn(c).square() + 0.1
        rows = [randn(c), rstd, rstd * randn(c), randn(c), torch.full((c,), 1 / max(1, n * h * w))]
        inputs[name] = torch.stack(rows).to(wide)
    inputs["partials"] = torch.stack([torch.full((3, c), 4.0), randn(3, c), randn(3, c).square()], 1).to(wide)
    inputs["partials"][1] = 0
    inputs["sums"], inputs["coef"] = randn(2, c).to(wide), randn(3, c).to(wide)
    for name in ("weight", "bias", "conv_bias", "running_mean"):
        inputs[name] = randn(c).to(dtype)
    inputs["running_var"] = (randn(c).square() + 0.5).to(dtype)
    inputs["tracked"] = torch.tensor(3)
    return inputs


def rearranged(inputs: Inputs, to_format: torch.memory_format, double: bool = False) -> Inputs:
    """A copy of every tensor; activations in ``to_format``; in float64 if ``double``."""
    copies = {}
    for name, t in inputs.items():
        t = t.double() if double and t.is_floating_point() else t
        copies[name] = t.clone(memory_format=to_format) if t.dim() == 4 else t.clone()
    return copies


def named(*tensors: Tensor) -> dict[str, Tensor]:
    return {str(i): t for i, t in enumerate(tensors)}


def stats(e: ModuleType, i: Inputs) -> dict[str, Tensor]:
    return named(*reference.merge_partials(e.bn_stats(i["y"])))


def finalize(momentum: float | None, affine: bool, buffers: bool) -> Run:
    def run(e: ModuleType, i: Inputs) -> dict[str, Tensor]:
        wb = (i["weight"], i["bias"], i["conv_bias"]) if affine else (None, None, None)
        state = (i["running_mean"], i["running_var"], i["tracked"]) if buffers else (None, None, None)
        moments = e.bn_finalize(i["partials"], *wb, *state, momentum, 1e-5)
        return named(*moments, i["running_mean"], i["running_var"], i["tracked"].double())

    return run


def eval_moments(e: ModuleType, i: Inputs) -> dict[str, Tensor]:
    wide = i["moments"].dtype
    affine = e.bn_eval_moments(i["running_mean"], i["running_var"], i["weight"], i["bias"], i["conv_bias"], 1e-5, wide)
    return named(*affine, *e.bn_eval_moments(i["running_mean"], i["running_var"], None, None, None, 1e-3, wide))


def apply(residual: str | None, moments: str | None, relu: bool, front: bool = False) -> Run:
    def run(e: ModuleType, i: Inputs) -> dict[str, Tensor]:
        offset = i["y"].shape[1] - i["option_a"].shape[1] if front else 0
        shortcut, second = i.get(residual or ""), i.get(moments or "")
        stride = 2 if residual == "option_a" else 1
        return named(e.bn_apply(i["y"], i["moments"], shortcut, second, stride, offset, relu))

    return run


def join(skip: bool, relu: bool, projection: bool) -> Run:
    def run(e: ModuleType, i: Inputs) -> dict[str, Tensor]:
        second = (i["residual"], i["residual_moments"]) if projection else (None, None)
        dskip, out = i["dskip"] if skip else None, i["out"] if relu else None
        g, sums, residual_sums = e.join_bwd_reduce(i["dout"], dskip, out, i["y"], i["moments"], *second)
        return named(g, *sums, *residual_sums)

    return run


def pool(index: int, relu: bool) -> Run:
    def run(e: ModuleType, i: Inputs) -> dict[str, Tensor]:
        geometry = POOLS[index] if min(i["y"].shape[2:]) > 2 else POOLS[2]
        pooled = e.pool_apply(i["y"], i["moments"], *geometry, relu)
        dout = i["dout"][:, :, : pooled.shape[2], : pooled.shape[3]]
        g, sums = e.pool_bwd(dout, i["y"], i["moments"], *geometry, relu)
        return named(pooled, g, *sums)

    return run


BOTH = (False, True)
CASES: dict[str, Run] = {
    "stats": stats,
    **{f"finalize-{m}-{a:d}{b:d}": finalize(m, a, b) for m in (0.1, None) for a in BOTH for b in BOTH},
    "eval_moments": eval_moments,
    **{f"apply-{relu:d}": apply(None, None, relu) for relu in BOTH},
    **{f"apply-add-{relu:d}": apply("residual", None, relu) for relu in BOTH},
    **{f"apply-projection-{relu:d}": apply("residual", "residual_moments", relu) for relu in BOTH},
    **{f"apply-option_a-{front:d}": apply("option_a", None, True, front) for front in BOTH},
    **{
        f"reduce-{relu:d}": lambda e, i, relu=relu: named(*e.bn_bwd_reduce(i["dout"], i["y"], i["moments"], relu))
        for relu in BOTH
    },
    **{
        f"rebuild-{relu:d}": lambda e, i, relu=relu: named(
            *itertools.chain(
                *(t if t.dim() == 2 else [t] for t in e.bn_bwd_reduce_rebuild(i["dout"], i["y"], i["moments"], relu))
            )
        )
        for relu in BOTH
    },
    **{f"join-{s:d}{r:d}{p:d}": join(s, r, p) for s in BOTH for r in BOTH for p in BOTH},
    **{f"bwd_finalize-{t:d}": lambda e, i, t=t: named(*e.bn_bwd_finalize(i["sums"], i["moments"], t)) for t in BOTH},
    **{
        f"bwd_apply-{relu:d}": lambda e, i, relu=relu: named(
            e.bn_bwd_apply(i["dout"], i["y"], i["moments"], i["coef"], relu)
        )
        for relu in BOTH
    },
    **{f"pool-{index}-{relu:d}": pool(index, relu) for index in range(2) for relu in BOTH},
}
