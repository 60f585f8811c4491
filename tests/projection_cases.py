"""Inputs and calls of the projection's primitives, for the CPU library, the emulated device and compiled PTX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused import reference, reference_projection

Pair = tuple[int, int]
Inputs = dict[str, Any]
Run = Callable[[Any, Inputs], dict[str, Tensor]]


def make_inputs(x: tuple[int, ...], k: int, stride: Pair, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Tensors of one projection: activations in ``dtype``, per-channel tables in opmath, NCHW."""
    n, c, h, w = x
    p, q = -(-h // stride[0]), -(-w // stride[1])
    wide = reference.opmath(dtype)
    rng = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    inputs: Inputs = {"stride": stride, "x": randn(*x).to(dtype), "weight": (randn(k, c, 1, 1) / c**0.5).to(dtype)}
    inputs["y"] = (randn(n, k, p, q) + 2 * randn(k)[:, None, None]).to(dtype)
    inputs["g"], inputs["main"] = randn(n, k, p, q).to(dtype), randn(n, k, p, q).to(dtype)
    inputs["dx_main"] = randn(*x).to(dtype)
    inputs["bias"] = randn(k).to(dtype)
    for name in ("moments", "main_moments"):
        rstd = randn(k).square() + 0.1
        rows = [randn(k), rstd, randn(k), randn(k), torch.full((k,), 1 / max(1, n * p * q))]
        inputs[name] = torch.stack(rows).to(wide)
    inputs["moments"][0] = (inputs["y"].double().mean((0, 2, 3)) if n else randn(k)).to(wide)
    inputs["sums"] = (randn(2, k) * max(1, n * p * q) ** 0.5).to(wide)
    return inputs


def rearranged(inputs: Inputs, to_format: torch.memory_format, double: bool = False) -> Inputs:
    """A copy of every tensor; activations in ``to_format``; in float64 if ``double``."""

    def copy(t: Tensor) -> Tensor:
        t = t.double() if double else t
        return t.clone(memory_format=to_format) if t.dim() == 4 else t.clone()

    return {name: copy(v) if isinstance(v, Tensor) else v for name, v in inputs.items()}


def _merged(partials: Tensor) -> dict[str, Tensor]:
    return dict(zip(("count", "mean", "m2"), reference.merge_partials(partials), strict=True))


def train(bias: bool) -> Run:
    def run(e: Any, i: Inputs) -> dict[str, Tensor]:
        given = i["bias"] if bias else None
        out, partials = e.projection_fwd(i["x"], i["weight"], given, i["stride"], True, None, None, None, False)
        return {"y": out, **_merged(partials)}

    return run


def infer(bias: bool, own: bool, add: bool, add_affine: bool, relu: bool) -> Run:
    def run(e: Any, i: Inputs) -> dict[str, Tensor]:
        chosen = (i["moments"] if own else None, i["main"] if add else None, i["main_moments"] if add_affine else None)
        given = i["bias"] if bias else None
        out, partials = e.projection_fwd(i["x"], i["weight"], given, i["stride"], False, *chosen, relu)
        assert partials.shape == (0, 3, i["weight"].shape[0])
        return {"out": out}

    return run


PROLOGUES = {"plain": (False, False), "running": (True, False), "batch": (True, True)}


def _gradient(i: Inputs, prologue: str) -> dict[str, Tensor | None]:
    moments, sums = PROLOGUES[prologue]
    return {
        "y": i["y"] if sums else None,
        "moments": i["moments"] if moments else None,
        "sums": i["sums"] if sums else None,
    }


def dgrad(prologue: str, add: bool) -> Run:
    def run(e: Any, i: Inputs) -> dict[str, Tensor]:
        t = _gradient(i, prologue)
        size, given = tuple(i["x"].shape[2:]), i["dx_main"] if add else None
        args = (t["y"], i["weight"], t["moments"], t["sums"], size, i["stride"], given)
        return {"dx": e.projection_dgrad(i["g"], *args)}

    return run


def wgrad(prologue: str, bias: bool, wide: bool) -> Run:
    def run(e: Any, i: Inputs) -> dict[str, Tensor]:
        t = _gradient(i, prologue)
        x = i["x"]
        dtype = torch.float32 if wide and x.dtype != torch.float64 else x.dtype
        dw, dbias = e.projection_wgrad(i["g"], t["y"], x, t["moments"], t["sums"], i["stride"], dtype, bias)
        return {"dw": dw, "dbias": dbias}

    return run


CASES: dict[str, Run] = {
    "train": train(False),
    "train-bias": train(True),
    "infer-bias-relu": infer(True, False, False, False, True),
    "infer-affine": infer(False, True, False, False, False),
    "infer-affine-add-relu": infer(False, True, True, False, True),
    "infer-block-end": infer(False, True, True, True, True),
    "infer-bias-add": infer(True, False, True, False, False),
    **{f"dgrad-{p}{'-add' * add}": dgrad(p, add) for p in PROLOGUES for add in (False, True)},
    **{f"wgrad-{p}": wgrad(p, p == "plain", False) for p in PROLOGUES},
    **{f"wgrad-{p}-wide-bias": wgrad(p, True, True) for p in PROLOGUES},
}


def expected(name: str, inputs: Inputs) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The float64 reference, and eager in both memory formats."""
    formats = (torch.contiguous_format, torch.channels_last)
    ref = CASES[name](reference_projection, rearranged(inputs, torch.contiguous_format, double=True))
    return ref, [CASES[name](reference_projection, rearranged(inputs, f)) for f in formats]


def to_tf32(inputs: Inputs) -> Inputs:
    """Operands of products that TF32 holds exactly, those that a prologue makes included: all on a coarse grid."""
    out = {name: v.mul(4).round().clamp(-8, 8) / 4 if isinstance(v, Tensor) else v for name, v in inputs.items()}
    for name in ("moments", "main_moments"):
        mean, rstd, scale, shift, _ = out[name]
        out[name] = torch.stack([mean, rstd.sign() + 1, 2 * scale.sign(), shift, torch.full_like(mean, 0.25)])
    out["sums"] = out["sums"].clamp(-1, 2).round()
    return out
