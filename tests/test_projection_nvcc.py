"""The projection's CUDA kernels as nvcc compiles them: resources, compiled PTX executed, bytes counted."""

from __future__ import annotations

import re

import pytest
import torch

from resnet_fused.numerics import assert_law, judge_all
from tests.emulation import device, nvcc, ptx
from tests.emulation.projection import Emulated, tiles
from tests.emulation.projection_ptx import on_ptx
from tests.projection_cases import CASES, expected, make_inputs, to_tf32

needs_compiler = pytest.mark.skipif(
    bool(nvcc.missing_tools() or device.missing_tools()), reason=nvcc.missing_tools() or device.missing_tools()
)
needs_gxx = pytest.mark.skipif(bool(device.missing_tools()), reason=device.missing_tools())
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
# nvcc takes several seconds for each: a quick run has two targets, and two of the four kinds of arithmetic.
QUICK = {("bf16", "sm_80"), ("bf16", "sm_90"), ("tf32", "sm_80")}


def builds(targets):
    quick = {pair for pair in QUICK if len(targets) > 2 or pair[0] == "bf16"}
    pairs = [(math, target) for target in targets for math in DTYPES]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.full) for pair in pairs]


BUILDS, EXECUTED = builds([target for target in nvcc.TARGETS if target != "sm_75"]), builds(("sm_80", "sm_90"))
MAIN = ("train-bias", "infer-block-end", "dgrad-batch-add", "wgrad-batch-wide-bias")
# A ragged shape, and one of whole tiles and whole sectors.
RAGGED = ((1, 72, 15, 11), 136, (1, 1))
WHOLE = ((2, 64, 16, 16), 128, (2, 2))
# C, K, H = W, stride of ResNet-50's projections.
SITES = {"layer1": (64, 256, 56, 1), "layer2": (256, 512, 56, 2), "layer3": (512, 1024, 28, 2)}
SITES["layer4"] = (1024, 2048, 14, 2)
MULTIPROCESSORS = {"A100": 108, "H100": 132}


@needs_compiler
@pytest.mark.parametrize(("math", "target"), BUILDS)
def test_resources(math, target):
    found = nvcc.kernels(math, target)
    assert {(k.operation, k.columns) for k in found} == {(o, c) for o in device.OPERATIONS for c in (64, 128)}
    for k in found:
        assert (k.spills, k.stack_bytes) == (0, 0), k
        assert k.shared_bytes <= nvcc.LIMITS[target][0], k
        assert k.blocks_per_multiprocessor() >= 1, k
        assert k.count("LDGSTS", "128") > 0 and k.count("STG", "128") > 0, k
        if math == "f32":
            assert k.count("FFMA") >= 64 and not k.count("HMMA"), k
        else:
            # 8 warps share 128 rows and the columns; a slice is 4 steps: all of its products are one loop body.
            assert k.count("HMMA") == 128 // 16 * k.columns // 8 // 8 * 4, k


@needs_compiler
@pytest.mark.parametrize(
    "math", [math if math == "f16" else pytest.param(math, marks=pytest.mark.full) for math in DTYPES]
)
def test_resources_of_sm_75(math):
    # The plan never chooses the tiles of 128 columns there.
    found = [k for k in nvcc.kernels(math, "sm_75") if k.columns == 64]
    assert {k.operation for k in found} == set(device.OPERATIONS)
    for k in found:
        assert (k.spills, k.stack_bytes) == (0, 0), k
        assert k.shared_bytes <= nvcc.LIMITS["sm_75"][0], k
        assert k.blocks_per_multiprocessor() >= 1, k
        assert k.count("LDG", "128") > 0 and k.count("STG", "128") > 0 and not k.count("LDGSTS"), k
        if math == "f16":
            # Products of 16x8x8, half as deep as those of 8.0.
            assert k.count("HMMA") == 128 // 16 * k.columns // 8 // 8 * 8, k
        else:
            assert k.count("FFMA") >= 64 and not k.count("HMMA"), k


def inputs_of(math, shape):
    inputs = make_inputs(*shape, DTYPES[math])
    return to_tf32(inputs) if math == "tf32" else inputs


@needs_compiler
@pytest.mark.parametrize(("math", "target"), EXECUTED)
def test_compiled_code_is_lawful_and_its_accesses_ideal(math, target):
    for shape in (RAGGED, WHOLE):
        inputs = inputs_of(math, shape)
        for name in MAIN:
            ref, eager = expected(name, inputs)
            stats: list[ptx.Stats] = []
            got = CASES[name](Emulated(on_ptx(math, target, stats), 64, 2), inputs)
            assert_law(got, ref, eager, DTYPES[math])
            for s in stats:
                assert s["shared_cycles"] == s["shared_ideal_cycles"]
                for kind in ("read", "written") if shape == WHOLE else ():
                    assert s[f"global_{kind}_sectors"] * 32 == s[f"global_{kind}_bytes"] > 0


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize(("math", "target"), EXECUTED)
def test_compiled_code_of_every_case_and_tile_is_lawful(math, target):
    for shape in (RAGGED, ((2, 19, 9, 7), 37, (2, 2)), ((1, 200, 3, 3), 264, (3, 1))):
        inputs = inputs_of(math, shape)
        for name in CASES:
            ref, eager = expected(name, inputs)
            for columns in (64, 128):
                assert_law(CASES[name](Emulated(on_ptx(math, target), columns), inputs), ref, eager, DTYPES[math])


@needs_compiler
@pytest.mark.parametrize(
    ("pattern", "name", "message"),
    [
        (r"bar\.sync\s+0;", "train-bias", "race|before it is written"),
        (r"cp\.async\.wait_group\s+\d+;", "dgrad-batch-add", "cp.async waited for"),
        (r"ldmatrix\.sync\.aligned\.m8n8\.x4(?=\.shared)", "dgrad-plain", None),
    ],
)
def test_planted_bug_in_the_ptx_is_caught(pattern, name, message):
    inputs = inputs_of("bf16", RAGGED)

    def edit(text: str) -> str:
        edited, number = re.subn(pattern, "" if message else "ldmatrix.sync.aligned.m8n8.x4.trans", text)
        assert number, pattern
        return edited

    run = Emulated(on_ptx("bf16", "sm_80", edit=edit))
    if message:
        with pytest.raises(ptx.PTXError, match=message):
            CASES[name](run, inputs)
        return
    ref, eager = expected(name, inputs)
    assert not all(v.passed for v in judge_all(CASES[name](run, inputs), ref, eager, torch.bfloat16))


def moved(n, c, k, h, stride, element, fwd_tiles, splits):
    """Bytes of (forward, dgrad with the main branch's gradient, wgrad) and of the partial sums among them."""
    p = -(-h // stride)
    rows, weight, x_all = n * p * p, k * c * element, n * h * h * c * element
    x, y = rows * c * element, rows * k * element
    tables = 4 * k
    statistics = fwd_tiles * 3 * tables
    fwd = x + weight + y + statistics
    dgrad = 2 * y + weight + 2 * x_all + 6 * tables
    parts = splits * 4 * (k * c) * 2 if splits > 1 else 0
    wgrad = 2 * y + x + weight + 6 * tables + parts
    return (fwd, dgrad, wgrad), (statistics, 0, parts)


@needs_compiler
def test_counted_bytes_are_those_of_the_formula():
    """Every byte that the compiled kernels touch, each once, for a layer2-like and a layer1-like site."""
    for (c, k, h, stride), splits in (((64, 128, 16, 2), 1), ((64, 128, 12, 1), 2)):
        inputs = make_inputs((2, c, h, h), k, (stride, stride), torch.bfloat16)
        p = -(-h // stride)
        expect, _ = moved(2, c, k, h, stride, 2, tiles(2 * p * p), splits)
        for name, bytes_moved in zip(("train", "dgrad-batch-add", "wgrad-batch"), expect, strict=True):
            stats: list[ptx.Stats] = []
            CASES[name](Emulated(on_ptx("bf16", "sm_80", stats), 64, splits), inputs)
            counted = sum(s["global_unique_read_bytes"] + s["global_unique_written_bytes"] for s in stats)
            assert counted == bytes_moved, name


@needs_gxx
@pytest.mark.parametrize("gpu", MULTIPROCESSORS)
@pytest.mark.parametrize("site", SITES)
def test_bytes_at_resnet50s_sites_are_within_5_percent_of_the_least(site, gpu):
    c, k, h, stride = SITES[site]
    for n in (32, 256):
        strides = (stride, stride)
        *_, splits = device.plan((n, c, h, h), k, strides, 2, True, MULTIPROCESSORS[gpu])
        counted, partials = moved(n, c, k, h, stride, 2, tiles(n * (-(-h // stride)) ** 2), splits)
        assert sum(counted) <= 1.05 * (sum(counted) - sum(partials))


@needs_gxx
def test_plan_chooses_tiles_that_fit_64_kib():
    for site in ((256, 64, 56, 56), (256, 256, 56, 56)):
        *columns, splits = device.plan(site, 512, (2, 2), 2, True, 40, 64 * nvcc.KIB)
        assert columns == [64, 64, 64]
        assert splits >= 1


@needs_gxx
@pytest.mark.parametrize(
    ("x", "k", "expect"),
    [
        ((256, 64, 56, 56), 256, (128, 64, 64)),  # C = 64: a tile of 128 would be half empty
        ((1, 1024, 14, 14), 2048, (64, 64, 128)),  # few rows: more blocks
        ((256, 192, 28, 28), 320, (64, 64, 64)),  # 1.5 and 2.5 tiles of 128
        ((0, 8, 4, 4), 8, (64, 64, 64)),
    ],
)
def test_plan_chooses_tiles(x, k, expect):
    *columns, splits = device.plan(x, k, (2, 2), 2, True, 132)
    assert tuple(columns) == expect
    assert splits >= 1
