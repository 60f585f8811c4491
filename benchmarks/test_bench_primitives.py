"""The CPU engine's passes over activations, in GB/s beside a copy of one tensor; batch norms in turns with ATen's.

Each case first proves its result right under the numerics law. ``passes`` counts the activation-sized
tensors that a primitive reads and writes; the copy's two are what the memory gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import OURS
from benchmarks.conftest import Turns
from resnet_fused import reference
from resnet_fused.benching.race import whole
from resnet_fused.engines import cpu
from resnet_fused.numerics import assert_law

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

EPS, ROUNDS = 1e-5, 11
QUICK = (8, 512, 14, 14)
SHAPES = [(8, 64, 56, 56), QUICK, (64, 16, 32, 32)]
DTYPES = [torch.float32, torch.bfloat16]
Inputs = dict[str, Tensor]
# name -> (passes, run)
PRIMITIVES: dict[str, tuple[int, Callable[[Any, Inputs], Any]]] = {
    "bn_stats": (1, lambda e, i: e.bn_stats(i["y"])),
    "bn_apply": (2, lambda e, i: e.bn_apply(i["y"], i["moments"], None, None, 1, 0, True)),
    "bn_apply_add": (3, lambda e, i: e.bn_apply(i["y"], i["moments"], i["skip"], None, 1, 0, True)),
    "bn_bwd_reduce": (2, lambda e, i: e.bn_bwd_reduce(i["dout"], i["y"], i["moments"], True)),
    "bn_bwd_reduce_rebuild": (3, lambda e, i: e.bn_bwd_reduce_rebuild(i["dout"], i["y"], i["moments"], True)),
    "join_bwd_reduce": (
        5,
        lambda e, i: e.join_bwd_reduce(i["dout"], i["skip"], i["out"], i["y"], i["moments"], None, None),
    ),
    "bn_bwd_apply": (3, lambda e, i: e.bn_bwd_apply(i["dout"], i["y"], i["moments"], i["coef"], True)),
}


def forward(e: Any, i: Inputs, skip: Tensor | None) -> Tensor:
    moments = e.bn_finalize(e.bn_stats(i["y"]), *[None] * 6, 0.1, EPS)
    return e.bn_apply(i["y"], moments, skip, None, 1, 0, True)


def backward(e: Any, i: Inputs) -> Tensor:
    coef = e.bn_bwd_finalize(e.bn_bwd_reduce(i["dout"], i["y"], i["moments"], True), i["moments"], True)
    return e.bn_bwd_apply(i["dout"], i["y"], i["moments"], coef, True)


def batch_norm(i: Inputs) -> Tensor:
    return torch.nn.functional.batch_norm(i["y"], None, None, None, None, True, 0.1, EPS)


def aten_backward(i: Inputs) -> Tensor:
    g = torch.ops.aten.threshold_backward(i["dout"], i["act"], 0)
    mean, rstd = i["moments"][0], i["moments"][1]
    dy, *_ = torch.ops.aten.native_batch_norm_backward(
        g, i["y"], i["gamma"], None, None, mean, rstd, True, EPS, (True, True, True)
    )
    return dy


# Whole batch norms of a training step, ours and ATen's.
WHOLE: dict[str, tuple[Callable[[Any, Inputs], Tensor], Callable[[Inputs], Tensor]]] = {
    "bn-relu forward": (lambda e, i: forward(e, i, None), lambda i: batch_norm(i).relu_()),
    "bn-add-relu forward": (lambda e, i: forward(e, i, i["skip"]), lambda i: batch_norm(i).add_(i["skip"]).relu_()),
    "bn-relu backward": (backward, aten_backward),
}


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rng = torch.Generator().manual_seed(0)
    names = ("y", "dout", "skip", "out")
    inputs = {name: torch.randn(shape, generator=rng).to(dtype) for name in names}
    inputs = {name: t.contiguous(memory_format=torch.channels_last) for name, t in inputs.items()}
    inputs["moments"] = reference.bn_finalize(reference.bn_stats(inputs["y"]), *[None] * 6, 0.1, EPS)
    inputs["act"] = reference.bn_apply(inputs["y"], inputs["moments"], None, None, 1, 0, True)
    inputs["gamma"] = torch.ones(shape[1])
    inputs["coef"] = torch.randn(3, shape[1], generator=rng)
    return inputs


def by_name(result: Any) -> dict[str, Tensor]:
    tensors = result if isinstance(result, tuple) else (result,)
    return {f"{i}.{j}": row for i, t in enumerate(tensors) for j, row in enumerate(t if t.dim() == 2 else [t])}


def prove(run: Callable[[Any, Inputs], Any], inputs: Inputs, dtype: torch.dtype) -> None:
    nchw, wide = {k: t.contiguous() for k, t in inputs.items()}, {k: t.double() for k, t in inputs.items()}
    eager = [by_name(run(reference, i)) for i in (nchw, inputs)]
    assert_law(by_name(run(cpu, inputs)), by_name(run(reference, wide)), eager, dtype)


def rate(passes: int, tensor: Tensor, seconds: float) -> dict[str, float]:
    """Bytes moved, and GB/s (1e9)."""
    moved = passes * tensor.numel() * tensor.element_size()
    return {"passes": passes, "bytes": moved, "GB_per_s": moved / seconds / 1e9}


SHAPE_PARAMS = [
    pytest.param(shape, marks=[pytest.mark.quick] if shape == QUICK else [], id=str(shape)) for shape in SHAPES
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPE_PARAMS)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(benchmark: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    passes, run = PRIMITIVES[name]
    inputs = make_inputs(shape, dtype)
    prove(run, inputs, dtype)
    benchmark.pedantic(run, (cpu, inputs), rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is not None:
        benchmark.extra_info.update(rate(passes, inputs["y"], benchmark.stats.stats.median))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPE_PARAMS)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_batch_norm(turns: Turns, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    run, theirs = WHOLE[name]
    inputs = make_inputs(shape, dtype)
    prove(run, inputs, dtype)
    steps = {OURS: whole(lambda: run(cpu, inputs)), "ATen": whole(lambda: theirs(inputs))}
    turns(f"{name} {'x'.join(map(str, shape))} {dtype}".replace("torch.", ""), steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPE_PARAMS)
def test_copy(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y = make_inputs(shape, dtype)["y"]
    assert torch.equal(y.clone(), y)
    benchmark.pedantic(y.clone, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is not None:
        benchmark.extra_info.update(rate(2, y, benchmark.stats.stats.median))
