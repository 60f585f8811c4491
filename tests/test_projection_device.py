"""The projection's CUDA source, compiled as C++ and run on an emulated device, under the numerics law."""

from __future__ import annotations

import pytest
import torch

from resnet_fused.numerics import assert_law, judge_all
from tests.emulation import device
from tests.emulation.projection import Emulated, on_device
from tests.projection_cases import CASES, expected, make_inputs, to_tf32

pytestmark = pytest.mark.skipif(bool(device.missing_tools()), reason=device.missing_tools())

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
# Input shape, K, stride: sizes beside the tiles, odd ones, one row, no row.
RAGGED = {
    "odd": ((2, 19, 9, 7), 37, (2, 2)),
    "beside": ((1, 72, 15, 11), 136, (1, 1)),
    "wide": ((1, 136, 5, 9), 72, (2, 3)),
    "deep": ((1, 200, 3, 3), 264, (3, 1)),
    "single": ((1, 8, 1, 1), 8, (2, 2)),
    "empty": ((0, 8, 4, 4), 16, (2, 2)),
}


def check(math: str, name: str, shape: str, **options) -> None:
    columns, splits = options.pop("columns", 64), options.pop("splits", 1)
    dtype = DTYPES[math]
    inputs = make_inputs(*RAGGED[shape], dtype)
    if math == "tf32":
        inputs = to_tf32(inputs)
    ref, eager = expected(name, inputs)
    got = CASES[name](Emulated(on_device(math, **options), columns, splits), inputs)
    assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in eager[0].items()}
    assert_law(got, ref, eager, dtype)


# Kernels of 64 columns alone: half the time to compile.
HALF = ("projection.cu", r"block_columns == 64 \? (\w+<64>\([^)]*\)) : \w+<128>\([^)]*\)", r"\1")
MAIN = ("train-bias", "infer-block-end", "dgrad-batch-add", "wgrad-batch-wide-bias")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("math", DTYPES)
def test_law(math, name):
    check(math, name, "odd")


@pytest.mark.parametrize("math", [pytest.param(m, marks=pytest.mark.full) if m == "tf32" else m for m in DTYPES])
def test_law_on_sm_75(math):
    for name in MAIN:
        check(math, name, "odd", variant="plain-sm_75", edits=(HALF,))


@pytest.mark.full
@pytest.mark.parametrize("variant", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("math", DTYPES)
def test_every_case_and_sanitizer_on_sm_75(math, variant):
    for name in CASES if variant == "plain" else MAIN:
        for shape in RAGGED:
            check(math, name, shape, splits=2 if shape == "beside" else 1, variant=f"{variant}-sm_75", edits=(HALF,))


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("math", DTYPES)
@pytest.mark.parametrize("shape", [s for s in RAGGED if s != "odd"])
def test_law_of_every_tile(math, shape, columns):
    for name in MAIN:
        check(math, name, shape, columns=columns, splits=2 if shape == "beside" else 1)


@pytest.mark.parametrize("math", DTYPES)
def test_unaligned_views(math):
    for name in MAIN:
        check(math, name, "beside", beyond=4 if DTYPES[math].itemsize == 4 else 2)


@pytest.mark.parametrize("math", ["bf16", "f32"])
def test_any_order_of_threads_and_blocks_gives_the_same_bits(math):
    inputs = make_inputs(*RAGGED["beside"], DTYPES[math])
    for name in MAIN:
        one, two = (CASES[name](Emulated(on_device(math, seed=seed), 64, 3), inputs) for seed in (0, 1))
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("prologue", ["plain", "batch"])
def test_a_nan_stays_where_it_is(prologue):
    inputs = make_inputs((2, 16, 6, 5), 24, (2, 2), torch.float32)
    inputs["x"][1, 3, 2, 2], inputs["g"][0, 5, 1, 0] = float("nan"), float("inf")
    for name in ("infer-affine-add-relu", f"dgrad-{prologue}", f"wgrad-{prologue}-wide-bias"):
        ref, eager = expected(name, inputs)
        assert_law(CASES[name](Emulated(on_device("f32")), inputs), ref, eager, torch.float32)


@pytest.mark.parametrize("name", MAIN)
def test_no_access_out_of_bounds_and_no_undefined_behaviour(name):
    for shape, columns in (("odd", 64), ("beside", 128)):
        check("bf16", name, shape, columns=columns, splits=2, variant="asan")


@pytest.mark.parametrize("name", MAIN)
def test_no_race(name):
    # Several slices and blocks each.
    check("bf16", name, "beside" if "wgrad" in name else "wide", splits=2, variant="tsan")


@pytest.mark.full
@pytest.mark.parametrize("variant", ["asan", "tsan"])
@pytest.mark.parametrize("math", DTYPES)
def test_sanitizers_in_every_arithmetic(math, variant):
    for name in MAIN:
        for shape, columns in (("odd", 128), ("beside", 64), ("deep", 128), ("single", 64), ("empty", 64)):
            check(math, name, shape, columns=columns, splits=2 if columns == 64 else 1, variant=variant)


BARRIER = r"__syncthreads\(\);"
# Name: (file, pattern, replacement), the case that shows it, where it shows, and in what words (None: a wrong result).
PLANTED = {
    "barrier before a slice is read": (
        ("fwd_kernel.h", r"(cp_async_wait<[^;]*;\s*)" + BARRIER, r"\1"),
        "train-bias",
        "tsan",
        "data race",
    ),
    "barrier before the staged product": (
        ("dgrad_kernel.h", r"(product\);\s*)" + BARRIER, r"\1"),
        "dgrad-plain",
        "tsan",
        "data race",
    ),
    "barrier after the transform": (
        ("wgrad_kernel.h", BARRIER + r"(\s*if constexpr \(Shared::kStages > 1\))", r"\1"),
        "wgrad-batch",
        "tsan",
        "data race",
    ),
    "barrier in one branch": (
        ("fwd_kernel.h", BARRIER + r"(\s*fwd_write)", r"if (threadIdx.x < 64) __syncthreads();\1"),
        "train-bias",
        "plain",
        "deadlock",
    ),
    "wait for a copy": (("fwd_kernel.h", r"cp_async_wait<[^;]*;", ""), "train-bias", "plain", None),
    "row out of bounds": (
        ("fwd_kernel.h", r" \|\| row \+ block_row >= args\.shape\.rows", ""),
        "infer-affine",
        "asan",
        "heap-buffer-overflow",
    ),
    "bound of the gathered rows": (
        ("tile.h", r"if \(row >= shape\.rows\) return -1;", ""),
        "train-bias",
        "asan",
        "AddressSanitizer",
    ),
    "stride of the columns": (("tile.h", r"q \* shape\.stride_w", "q * shape.stride_h"), "train-bias", "plain", None),
    "rows left of a split": (("wgrad_kernel.h", r"\(index \+ 1\)", "index"), "wgrad-plain", "plain", None),
    "barrier before the only stage is loaded again": (
        ("dgrad_kernel.h", r"(kStages == 1\) \{\s*)" + BARRIER, r"\1"),
        "dgrad-plain",
        "tsan-sm_75",
        "data race",
    ),
    "half of a product of float16": (
        ("types.h", r"mma_f16_k8\(d, a \+ 2, b \+ 1\);", ""),
        "train-bias",
        "plain-sm_75",
        None,
    ),
    "mean of the backward": (("prologue.h", r"y\[i\] - k\.mean\[i\]", "y[i]"), "dgrad-batch", "plain", None),
}


# Each is a build of several seconds; one for every way of catching is enough for a quick run.
QUICK = ("barrier before a slice is read", "row out of bounds", "stride of the columns")


@pytest.mark.parametrize("bug", [bug if bug in QUICK else pytest.param(bug, marks=pytest.mark.full) for bug in PLANTED])
def test_planted_bug_is_caught(bug):
    edit, name, variant, words = PLANTED[bug]
    # Three slices, so that the staged product lies where the last one was.
    math = "f16" if "float16" in bug else "bf16"
    inputs = make_inputs(*RAGGED["beside" if variant.startswith("tsan") else "wide"], DTYPES[math])
    run = Emulated(on_device(math, variant, (edit, HALF)))
    if words is not None:
        with pytest.raises(device.DeviceError, match=words):
            CASES[name](run, inputs)
        return
    ref, eager = expected(name, inputs)
    got = CASES[name](run, inputs)
    assert not all(verdict.passed for verdict in judge_all(got, ref, eager, DTYPES[math]))
