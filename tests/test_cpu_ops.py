"""The CPU engine as PyTorch ops: schemas, fake kernels, compilation, errors, and the choice of instruction set."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from resnet_fused import reference
from resnet_fused.engines import cpu
from tests.cpu_cases import make_inputs, rearranged

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

PRIMITIVES = [name for name in cpu.__all__ if hasattr(reference, name)]


def op_samples() -> dict[str, tuple[Any, ...]]:
    i = rearranged(make_inputs((2, 5, 6, 4), torch.bfloat16), torch.channels_last)
    y, m, d, r, rm = i["y"], i["moments"], i["dout"], i["residual"], i["residual_moments"]
    buffers = (i["running_mean"], i["running_var"])
    pooled = torch.randn(2, 5, 3, 2).to(y.dtype)
    geometry = [[3, 3], [2, 2], [1, 1]]
    return {
        "bn_stats": (y,),
        "bn_finalize": (i["partials"], i["weight"], i["bias"], i["conv_bias"], *buffers, i["tracked"], None, 1e-5),
        "bn_eval_moments": (*buffers, i["weight"], i["bias"], None, 1e-5, torch.float32),
        "bn_apply": (y, m, i["option_a"], None, 2, 1, True),
        "bn_bwd_reduce": (d, y, m, True),
        "bn_bwd_reduce_rebuild": (d, y, m, True),
        "join_bwd_reduce": (d, i["dskip"], i["out"], y, m, r, rm),
        "bn_bwd_finalize": (i["sums"], m, True),
        "bn_bwd_apply": (d, y, m, i["coef"], True),
        "pool_apply": (y, m, *geometry, True),
        "pool_bwd": (pooled, y, m, *geometry, True),
    }


@pytest.mark.parametrize("name", op_samples() if REASON is None else [])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.resnet_fused, name).default, op_samples()[name])


@pytest.mark.parametrize("shape", [(0, 5, 6, 4), (2, 5, 1, 1), (2, 1, 6, 4)])
def test_fake_kernels_give_the_strides_of_the_real_ones(shape: tuple[int, ...]) -> None:
    i = make_inputs(shape, torch.float32)
    for args in (
        (i["y"], i["moments"], None, None, 1, 0, True),
        (i["y"], i["moments"], i["residual"], None, 1, 0, True),
    ):
        torch.library.opcheck(torch.ops.resnet_fused.bn_apply.default, args)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_signatures_are_those_of_the_reference(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (cpu, reference))
    assert ours == theirs
    assert cpu.load() is None or name.startswith("conv")


def test_every_primitive_is_exposed() -> None:
    public = {n for n, f in vars(reference).items() if inspect.isfunction(f) and f.__module__ == reference.__name__}
    helpers = {n for n in public if n.startswith("_")} | {"opmath", "merge_partials", "pad_residual"}
    assert public - helpers == set(PRIMITIVES)


def test_compiles_in_one_graph() -> None:
    i = rearranged(make_inputs((2, 6, 8, 8), torch.float32), torch.channels_last)

    def step(y: torch.Tensor, running_mean: torch.Tensor, running_var: torch.Tensor) -> torch.Tensor:
        state = (running_mean, running_var, i["tracked"])
        moments = cpu.bn_finalize(cpu.bn_stats(y), i["weight"], i["bias"], None, *state, 0.1, 1e-5)
        return (
            cpu.pool_apply(y * 2, moments, (3, 3), (2, 2), (1, 1), True)
            + cpu.bn_apply(y, moments, None, None, 1, 0, True).mean()
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager_state = [i["running_mean"].clone(), i["running_var"].clone()]
    compiled_state = [t.clone() for t in eager_state]
    assert torch.equal(compiled(i["y"], *compiled_state), step(i["y"], *eager_state))
    assert all(map(torch.equal, compiled_state, eager_state))
    assert not torch.equal(compiled_state[0], i["running_mean"])


def bad_calls() -> dict[str, tuple[Callable[[], Any], str]]:
    i = make_inputs((2, 4, 6, 6), torch.float32)
    y, m, half = i["y"], i["moments"], i["y"].half()
    state = (i["running_mean"], i["running_var"])
    geometry = ((3, 3), (2, 2), (1, 1))
    return {
        "rank": (lambda: cpu.bn_stats(y[0]), r"bn_stats: y: expected shape \(N, C, H, W\).*got shape \(4, 6, 6\)"),
        "dtype": (lambda: cpu.bn_stats(y.long()), "bn_stats: y: expected float32, .*got int64"),
        "channels": (lambda: cpu.bn_stats(y[:, :0]), r"bn_stats: y: .*got shape \(2, 0, 6, 6\)"),
        "moments": (
            lambda: cpu.bn_apply(half, m.half(), None, None, 1, 0, True),
            "moments: expected float32, got float16",
        ),
        "moments shape": (
            lambda: cpu.bn_apply(y, m[:4], None, None, 1, 0, True),
            r"bn_apply: moments: expected shape \(5, 4\), got shape \(4, 4\)",
        ),
        "residual dtype": (
            lambda: cpu.bn_apply(y, m, half, None, 1, 0, True),
            "bn_apply: residual: expected float32, got float16",
        ),
        "residual shape": (
            lambda: cpu.bn_apply(y, m, y[:, :, 1:], None, 1, 0, True),
            "bn_apply: residual: expected shape",
        ),
        "offset": (
            lambda: cpu.bn_apply(y, m, i["option_a"], None, 2, 5, True),
            r"bn_apply: channel_offset: expected an integer in \[0, C\], got 5",
        ),
        "stride": (
            lambda: cpu.bn_apply(y, m, i["option_a"], None, 0, 0, True),
            "bn_apply: residual_stride: expected an integer >= 1, got 0",
        ),
        "dout": (lambda: cpu.bn_bwd_reduce(half, y, m, True), "bn_bwd_reduce: dout: expected float32, got float16"),
        "dskip": (
            lambda: cpu.join_bwd_reduce(y, y[:1], None, y, m, None, None),
            r"join_bwd_reduce: dskip: expected shape \(2, 4, 6, 6\), got shape \(1, 4, 6, 6\)",
        ),
        "coef": (lambda: cpu.bn_bwd_apply(y, y, m, m, True), "bn_bwd_apply: coef: expected shape"),
        "sums": (lambda: cpu.bn_bwd_finalize(m, m, True), "bn_bwd_finalize: sums: expected shape"),
        "partials": (
            lambda: cpu.bn_finalize(m, None, None, None, None, None, None, 0.1, 1e-5),
            r"bn_finalize: partials: expected shape \(T, 3, C\)",
        ),
        "counter": (
            lambda: cpu.bn_finalize(i["partials"], None, None, None, *state, torch.tensor(1.0), 0.1, 1e-5),
            "bn_finalize: num_batches_tracked: expected int64, got float32",
        ),
        "no counter": (
            lambda: cpu.bn_finalize(i["partials"], None, None, None, *state, None, None, 1e-5),
            "bn_finalize: num_batches_tracked: expected a counter, which momentum=None needs, got None",
        ),
        "weight": (
            lambda: cpu.bn_eval_moments(*state, i["weight"][:3], None, None, 1e-5, torch.float32),
            r"bn_eval_moments: weight: expected shape \(4,\), got shape \(3,\)",
        ),
        "eval dtype": (
            lambda: cpu.bn_eval_moments(*state, None, None, None, 1e-5, torch.float16),
            "bn_eval_moments: dtype: expected float32 or float64, got float16",
        ),
        "padding": (
            lambda: cpu.pool_apply(y, m, (3, 3), (2, 2), (2, 1), True),
            "pool_apply: padding: expected at most half",
        ),
        "pooled": (
            lambda: cpu.pool_bwd(y, y, m, *geometry, True),
            r"pool_bwd: dout: expected shape \(2, 4, 3, 3\), got shape \(2, 4, 6, 6\)",
        ),
    }


@pytest.mark.parametrize("name", bad_calls() if REASON is None else [])
def test_bad_arguments_are_named(name: str) -> None:
    call, message = bad_calls()[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def isa_of_a_new_process(value: str) -> str:
    code = "from resnet_fused.engines import cpu; print(cpu.load() or cpu.isa())"
    environment = {**os.environ, "RESNET_FUSED_CPU_ISA": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout.strip()


def test_environment_overrides_the_instruction_set() -> None:
    assert isa_of_a_new_process("baseline") == "baseline"
    refusal = isa_of_a_new_process("mmx")
    assert "RESNET_FUSED_CPU_ISA: expected" in refusal
    assert "got mmx" in refusal
