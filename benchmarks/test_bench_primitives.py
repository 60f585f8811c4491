"""The CPU engine's passes over activations, in GB/s beside a plain copy of one tensor.

Each case first proves its result right under the numerics law. ``passes`` counts the activation-sized
tensors that a primitive reads and writes; the copy's two are what the memory gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import reference
from resnet_fused.engines import cpu
from resnet_fused.numerics import assert_law

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SHAPES = [(8, 64, 56, 56), (8, 512, 14, 14), (64, 16, 32, 32)]
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


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rng = torch.Generator().manual_seed(0)
    names = ("y", "dout", "skip", "out")
    inputs = {name: torch.randn(shape, generator=rng).to(dtype) for name in names}
    inputs = {name: t.contiguous(memory_format=torch.channels_last) for name, t in inputs.items()}
    inputs["moments"] = reference.bn_finalize(reference.bn_stats(inputs["y"]), *[None] * 6, 0.1, 1e-5)
    inputs["coef"] = torch.randn(3, shape[1], generator=rng)
    return inputs


def by_name(result: Any) -> dict[str, Tensor]:
    tensors = result if isinstance(result, tuple) else (result,)
    return {f"{i}.{j}": row for i, t in enumerate(tensors) for j, row in enumerate(t if t.dim() == 2 else [t])}


def prove(run: Callable[[Any, Inputs], Any], inputs: Inputs, dtype: torch.dtype) -> None:
    nchw, wide = {k: t.contiguous() for k, t in inputs.items()}, {k: t.double() for k, t in inputs.items()}
    eager = [by_name(run(reference, i)) for i in (nchw, inputs)]
    assert_law(by_name(run(cpu, inputs)), by_name(run(reference, wide)), eager, dtype)


def report(benchmark: Any, passes: int, tensor: Tensor) -> None:
    """Add bytes and GB/s (1e9) of the median round to the JSON."""
    moved = passes * tensor.numel() * tensor.element_size()
    benchmark.extra_info.update(bytes=moved, passes=passes)
    if benchmark.stats is not None:
        benchmark.extra_info["GB_per_s"] = moved / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(benchmark: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    passes, run = PRIMITIVES[name]
    inputs = make_inputs(shape, dtype)
    prove(run, inputs, dtype)
    benchmark.group = f"{shape} {dtype}"
    benchmark.pedantic(run, (cpu, inputs), rounds=11, warmup_rounds=2)
    report(benchmark, passes, inputs["y"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copy(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y = make_inputs(shape, dtype)["y"]
    assert torch.equal(y.clone(), y)
    benchmark.group = f"{shape} {dtype}"
    benchmark.pedantic(y.clone, rounds=11, warmup_rounds=2)
    report(benchmark, 2, y)
