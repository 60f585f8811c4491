"""The batch-norm and pool kernels: interpreted, executed as compiled PTX, compiled for every target, and counted."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_fused import reference
from resnet_fused.compiling import offline
from resnet_fused.kernels import reduce
from resnet_fused.kernels.launch import is_counting, recording
from tests.emulation import bn_samples, ptx, runner
from tests.emulation.bn_samples import KERNELS
from tests.emulation.launch import on_ptx

needs_compiler = pytest.mark.skipif(bool(offline.missing_tools()), reason=offline.missing_tools())
CASES = "tests.emulation.bn_cases"
SHAPE = (2, 24, 5, 7)
HALF, FLOAT = torch.bfloat16, torch.float32
WINDOW = ((3, 3), (2, 2), (1, 1))
NO_PROJECTION = ("residual_y", "residual_moments")

# Per-channel kernels, whose arguments are float32 whatever the activations are.
VECTORS = {
    "bn_finalize": lambda: bn_samples.finalize(24, 200),
    "bn_finalize cumulative": lambda: bn_samples.finalize(24, 200, momentum=None),
    "bn_eval_moments": lambda: bn_samples.eval_moments(24),
    "bn_bwd_finalize": lambda: bn_samples.bwd_finalize(24),
    "merge_partials": lambda: bn_samples.merge(200, 24),
    "sum_rows": lambda: bn_samples.sum_of_rows(200, 2, 24),
}
ACTIVATIONS = {
    "bn_stats": lambda dtype: bn_samples.stats(SHAPE, dtype),
    "bn_apply": lambda dtype: bn_samples.apply(SHAPE, dtype, specials=True),
    "bn_apply projection": lambda dtype: bn_samples.apply(SHAPE, dtype, "projection"),
    "bn_apply option_a": lambda dtype: bn_samples.apply(SHAPE, dtype, "option_a"),
    "bn_bwd_reduce_rebuild": lambda dtype: bn_samples.bwd_reduce(SHAPE, dtype, rebuild=True),
    "bn_bwd_apply": lambda dtype: bn_samples.bwd_apply(SHAPE, dtype),
    "join_bwd_reduce": lambda dtype: bn_samples.join(SHAPE, dtype),
    "pool_apply": lambda dtype: bn_samples.pooling(SHAPE, dtype, WINDOW),
    "pool_bwd": lambda dtype: bn_samples.pooling(SHAPE, dtype, WINDOW, backward=True),
}
VARIANTS = {
    "bn_apply plain": lambda dtype: bn_samples.apply(SHAPE, dtype, "plain", specials=True),
    "bn_apply linear": lambda dtype: bn_samples.apply(SHAPE, dtype, relu=False),
    "bn_bwd_reduce": lambda dtype: bn_samples.bwd_reduce(SHAPE, dtype),
    "bn_bwd_reduce linear": lambda dtype: bn_samples.bwd_reduce(SHAPE, dtype, relu=False),
    "bn_bwd_apply linear": lambda dtype: bn_samples.bwd_apply(SHAPE, dtype, relu=False),
    "bn_bwd_apply frozen": lambda dtype: bn_samples.bwd_apply(SHAPE, dtype, training=False),
    "join_bwd_reduce plain": lambda dtype: bn_samples.join(SHAPE, dtype, drop=NO_PROJECTION),
    "join_bwd_reduce alone": lambda dtype: bn_samples.join(SHAPE, dtype, drop=("dskip", *NO_PROJECTION), relu=False),
    "pool_apply linear": lambda dtype: bn_samples.pooling(SHAPE, dtype, WINDOW, relu=False),
    "pool_bwd linear": lambda dtype: bn_samples.pooling(SHAPE, dtype, ((2, 3), (1, 2), (0, 1)), False, backward=True),
    "odd channels": lambda dtype: bn_samples.apply((1, 5, 3, 3), dtype, "plain"),
}


@pytest.fixture(scope="module")
def interpreted():
    return runner.run_cases(CASES)


@pytest.mark.parametrize("name", runner.case_names(CASES))
def test_interpreted(interpreted, name):
    assert not interpreted[name], interpreted[name]


def compiled_results(sample, target):
    with on_ptx(target) as launches:
        got = sample.run(KERNELS, bn_samples.to_format(torch.channels_last))
    assert launches
    return got


@needs_compiler
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", VECTORS)
def test_compiled_vector_kernel_is_lawful(name, target):
    sample = VECTORS[name]()
    assert not sample.broken(compiled_results(sample, target))


@needs_compiler
@pytest.mark.parametrize(("target", "dtype"), [("sm_80", FLOAT), ("sm_80", HALF), ("sm_90", FLOAT), ("sm_90", HALF)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_compiled_kernel_is_lawful(name, target, dtype):
    sample = ACTIVATIONS[name](dtype)
    assert not sample.broken(compiled_results(sample, target))


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF, torch.float16])
@pytest.mark.parametrize("name", [*VARIANTS, *ACTIVATIONS])
def test_compiled_variant_is_lawful(name, target, dtype):
    sample = {**VARIANTS, **ACTIVATIONS}[name](dtype)
    assert not sample.broken(compiled_results(sample, target))


def without(pattern: str, replacement: str = ""):
    """An edit of the PTX that replaces every match; it must match."""

    def edit(text: str) -> str:
        edited, number = re.subn(pattern, replacement, text)
        assert number, pattern
        return edited

    return edit


@needs_compiler
@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("bn_stats", without(r"(?m)^\s*bar\.sync[^;]*;"), "shared-memory race"),
        ("join_bwd_reduce", without(r"(?m)^\s*bar\.sync[^;]*;"), "shared-memory race"),
        ("bn_apply projection", without(r"@!?%p\d+ (st\.global)", r"\1"), "global out-of-bounds"),
        ("pool_bwd", without(r"@!?%p\d+ (ld\.global)", r"\1"), "global out-of-bounds"),
    ],
)
def test_planted_bug_in_the_compiled_code_is_caught(name, edit, message):
    sample = ACTIVATIONS[name](HALF)
    with pytest.raises(ptx.PTXError, match=message), on_ptx("sm_80", edit=edit):
        sample.run(KERNELS)


EVERY = {**ACTIVATIONS, **VARIANTS, **{name: lambda _, make=make: make() for name, make in VECTORS.items()}}
# Stores of per-channel results, at most, a few floats per program; every other store is 128 bits wide.
NARROW_STORES = {"_bn_stats_kernel": 3, "_bn_bwd_reduce_kernel": 2, "_join_bwd_reduce_kernel": 4, "_pool_bwd_kernel": 2}
# An option A shortcut of 8 channels behind 2 zeros is not aligned, five channels are not, and vectors are narrow.
NARROW = {"bn_apply option_a", "odd channels", *VECTORS}


def assert_offline_bounds(name, targets):
    with offline.compile_offline(targets) as kernels:
        EVERY[name](HALF).run(KERNELS, bn_samples.to_format(torch.channels_last))
    for kernel in kernels:
        assert (kernel.spill_loads, kernel.spill_stores, kernel.stack_bytes, kernel.local_bytes) == (0, 0, 0, 0), kernel
        assert kernel.launches, kernel
        if kernel.target.startswith("sm_") and kernel.name != "_sum_rows_kernel" and name not in NARROW:
            assert kernel.wide_loads == kernel.count("LDG") > 0, kernel
            assert kernel.count("STG") - kernel.wide_stores <= NARROW_STORES.get(kernel.name, 0), kernel


@needs_compiler
@pytest.mark.parametrize("name", ["bn_stats", "bn_apply projection", "bn_bwd_apply", "join_bwd_reduce", "bn_finalize"])
def test_offline_bounds(name):
    assert_offline_bounds(name, ("sm_90", "gfx942"))


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("name", EVERY)
def test_offline_bounds_of_every_target(name):
    assert_offline_bounds(name, ("sm_80", "sm_90", "sm_100", "gfx942"))


@pytest.mark.parametrize("name", EVERY)
def test_launches_are_counted_on_the_meta_device(name):
    sample = EVERY[name](HALF)
    want = sample.run(reference, bn_samples.to_format(torch.channels_last))
    with recording(run=False) as records:
        assert is_counting()
        got = sample.run(KERNELS, lambda t: bn_samples.to_format(torch.channels_last)(t).to("meta"))
    assert records
    for name, t in got.items():
        assert (t.shape, t.dtype, t.device.type) == (want[name].shape, want[name].dtype, "meta")
        assert name not in ("g", "dy", "act", "out") or t.is_contiguous(memory_format=torch.channels_last)


def moved(name, dtype=HALF):
    with recording(run=False) as records:
        EVERY[name](dtype).run(KERNELS, lambda t: bn_samples.to_format(torch.channels_last)(t).to("meta"))
    return [record.bytes["activations"] for record in records]


def test_every_activation_is_moved_once():
    one = 2 * 24 * 5 * 7 * HALF.itemsize
    pooled = 2 * 24 * 3 * 4 * HALF.itemsize
    assert moved("bn_stats")[0] == (one, 0)
    assert moved("bn_apply") == [(one, one)]
    assert moved("bn_apply projection") == [(2 * one, one)]
    assert moved("bn_bwd_reduce")[0] == (2 * one, 0)
    assert moved("bn_bwd_reduce_rebuild")[0] == (2 * one, one)
    assert moved("bn_bwd_apply") == [(2 * one, one)]
    assert moved("join_bwd_reduce")[0] == (5 * one, one)
    assert moved("pool_apply") == [(one, pooled)]
    assert moved("pool_bwd")[0] == (one + pooled, one)


EMPTY = (0, 24, 5, 7)


def test_an_empty_batch_starts_no_kernel_and_sums_to_zero():
    y = torch.empty(EMPTY, dtype=HALF)
    moments = bn_samples.some_moments(24)
    with recording(run=False) as records:
        assert KERNELS.bn_stats(y).tolist() == torch.zeros(1, 3, 24).tolist()
        assert KERNELS.bn_apply(y, moments, y, None, 1, 0, True).shape == EMPTY
        assert KERNELS.bn_bwd_reduce(y, y, moments, True).tolist() == torch.zeros(2, 24).tolist()
        sums, act = KERNELS.bn_bwd_reduce_rebuild(y, y, moments, True)
        assert (sums.abs().sum().item(), act.shape) == (0, EMPTY)
        g, sums, residual_sums = KERNELS.join_bwd_reduce(y, y, y, y, moments, y, moments)
        assert (g.shape, sums.abs().sum().item(), residual_sums.abs().sum().item()) == (EMPTY, 0, 0)
        assert KERNELS.bn_bwd_apply(y, y, moments, moments[:3], True).shape == EMPTY
        out = KERNELS.pool_apply(y, moments, *WINDOW, True)
        assert out.shape == (0, 24, 3, 4)
        g, sums = KERNELS.pool_bwd(out, y, moments, *WINDOW, True)
        assert (g.shape, sums.abs().sum().item()) == (EMPTY, 0)
    assert not records


def test_arguments_that_cannot_be_served_are_refused():
    vector = torch.zeros(24)
    with pytest.raises(ValueError, match="num_batches_tracked: expected a counter"):
        KERNELS.bn_finalize(torch.zeros(1, 3, 24), None, None, None, vector, vector, None, None, 1e-5)
    with pytest.raises(ValueError, match=r"dtype: expected torch\.float32, got torch\.float64"):
        KERNELS.bn_eval_moments(vector, vector, None, None, None, 1e-5, torch.float64)


def test_the_number_of_programs_is_fixed_by_the_shape():
    tiles = reduce.RowTiles(256 * 56 * 56, 256)
    assert (tiles.block_rows, tiles.block_c, tiles.channel_blocks) == (32, 64, 4)
    assert tiles.reducing_grid == (reduce.PROGRAMS,)
    assert reduce.RowTiles(100, 2048).reducers == 4
    assert reduce.RowTiles(0, 64).reducers == 0
    assert [reduce.RowTiles(1, c).config["ALIGN_C"] for c in (3, 24, 72, 64, 100)] == [1, 8, 8, 16, 4]
