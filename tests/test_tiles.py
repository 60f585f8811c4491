"""Tile choice as a pure function: what fits, what is first, and what ResNet-50's shapes get on each target."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from resnet_fused.kernels import target as targets
from resnet_fused.kernels import tiles
from resnet_fused.kernels.target import KIB, Target
from resnet_fused.kernels.tiles import Problem

HALF, FLOAT = torch.bfloat16, torch.float32
NVIDIA = ("sm_80", "sm_86", "sm_90", "sm_100")
EVERY = (*NVIDIA, "sm_75", "sm_89", "sm_120", "gfx942", "gfx1100")
BATCH = 32
PRECISIONS = {"bf16": (HALF, False), "fp16": (torch.float16, False), "tf32": (FLOAT, False), "exact": (FLOAT, True)}

# ResNet-50 at 224 px, one convolution per kind and stage: (pixels of a side of the output, C, K, taps)
RESNET50 = [
    *((56 // 2**i, 256 * 2**i, 64 * 2**i, 1) for i in range(4)),
    *((56 // 2**i, 64 * 2**i, 64 * 2**i, 9) for i in range(4)),
    *((56 // 2**i, 64 * 2**i, 256 * 2**i, 1) for i in range(4)),
    *((28 // 2**i, 256 * 2**i, 512 * 2**i, 1) for i in range(3)),
    (112, 32, 64, 7),  # the stem, its image packed
]
RAGGED = [(1, 1, 1, 1), (3, 5, 7, 9), (9, 66, 130, 25), (1, 4, 1000, 1)]


def _problems(side, c, k, taps, dtype, exact):
    rows = BATCH * side**2
    yield from (Problem("fwd", rows, k, c, taps, dtype, loads, exact) for loads in (1, 2))
    yield Problem("dgrad", rows, c, k, taps, dtype, 2, exact)
    yield from (Problem("wgrad", k, c, rows, taps, dtype, loads, exact) for loads in (1, 2))


def problems(shapes, precision="bf16"):
    return [p for shape in shapes for p in _problems(*shape, *PRECISIONS[precision])]


@pytest.fixture(params=EVERY)
def target(request):
    return targets.named(request.param)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_candidate_is_a_configuration_that_can_run(target, precision):
    for problem in problems(RESNET50 + RAGGED, precision):
        found = tiles.candidates(problem, target)
        assert found and len(set(found)) == len(found), problem
        assert found == tiles.candidates(dataclasses.replace(problem), dataclasses.replace(target))
        assert tiles.choose(problem, target) == found[0]
        for tile in found:
            assert tiles.shared_bytes(problem, tile) <= target.shared_bytes, (problem, tile)
            for side in (tile.rows, tile.cols, tile.depth):  # tl.dot wants powers of two, at least 16 each
                assert side >= 16 and side & (side - 1) == 0, (problem, tile)
            assert tile.warps in (4, 8) and tile.stages >= 1, (problem, tile)
            assert tile.options() == {"num_warps": tile.warps, "num_stages": tile.stages}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_side_is_twice_what_the_problem_needs(target, precision):
    for problem in problems(RESNET50 + RAGGED, precision):
        wgrad = problem.kind == "wgrad"
        least = 16 if wgrad else 64  # a warpgroup's product has 64 rows
        for tile in tiles.candidates(problem, target):
            assert tile.rows < max(2 * problem.rows, least + 1), (problem, tile)
            assert tile.cols < max(2 * problem.cols, 17), (problem, tile)
            assert wgrad or tile.depth < max(2 * problem.depth, 17), (problem, tile)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_wgrad_splits_and_never_into_parts_of_less_than_eight_steps(target, precision):
    for problem in problems(RESNET50 + RAGGED, precision):
        for tile in tiles.candidates(problem, target):
            steps = math.ceil(problem.depth / tile.depth)
            most = max(1, steps // 8) if problem.kind == "wgrad" else 1
            assert 1 <= tile.split <= min(most, 256), (problem, tile)


def test_a_split_keeps_the_processors_busy():
    target = targets.named("sm_90")
    for problem in problems(RESNET50):
        tile = tiles.choose(problem, target)
        if tile.split == 1:
            continue
        blocks = math.ceil(problem.rows / tile.rows) * math.ceil(problem.cols / tile.cols) * problem.taps
        waves = blocks * tile.split / (target.processors * (1 if tile.warps == 8 else 2))
        assert waves / math.ceil(waves) > 0.5, (problem, tile)


def test_a_split_fills_its_waves():
    target = dataclasses.replace(targets.named("sm_90"), processors=1000)
    problem = Problem("wgrad", 128, 128, 10**7, 9, HALF)  # partial sums are nothing beside so many rows
    tile = tiles.choose(problem, target)
    assert (tile.rows, tile.cols, tile.warps) == (128, 128, 8)
    waves = problem.taps * tile.split / target.processors
    assert waves / math.ceil(waves) > 0.99


def test_more_processors_split_no_less():
    few, many = (dataclasses.replace(targets.named("sm_90"), processors=n) for n in (16, 256))
    for problem in problems(RESNET50):
        assert tiles.choose(problem, few).split <= tiles.choose(problem, many).split
    thin = Problem("wgrad", 64, 64, 10**6, 1, HALF)
    assert tiles.choose(thin, few).split < tiles.choose(thin, many).split


def _resnet50(kind, **wanted):
    found = [p for p in problems(RESNET50) if p.kind == kind and all(getattr(p, k) == v for k, v in wanted.items())]
    assert found
    return found


@pytest.mark.parametrize("arch", NVIDIA)
def test_what_the_tensor_cores_bind_gets_one_large_block(arch):
    for problem in _resnet50("fwd", loads=1, taps=9):
        tile = tiles.choose(problem, targets.named(arch))
        assert ((tile.rows, tile.cols) == (128, 128)) == (problem.cols >= 256), (problem, tile)
        assert tile.warps == 8


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_what_bandwidth_binds_gets_two_blocks_on_a_multiprocessor(arch):
    target = targets.named(arch)
    for problem in _resnet50("fwd", taps=1, loads=1):
        if min(problem.cols, problem.depth) <= 128:
            tile = tiles.choose(problem, target)
            assert 2 * tiles.shared_bytes(problem, tile) <= target.shared_bytes, (problem, tile)
            least = 4 if target.has_tcgen05 else 8  # of eight warps, the tile that is preferred elsewhere spills there
            assert tile.warps >= least and tile.stages >= 3, (problem, tile)


@pytest.mark.parametrize("kind", ["fwd", "dgrad", "wgrad"])
def test_a_small_target_keeps_the_choice_where_it_fits(kind):
    large, small = targets.named("sm_80"), targets.named("sm_86")
    moved = 0
    for problem in _resnet50(kind):
        wanted, got = tiles.choose(problem, large), tiles.choose(problem, small)
        if tiles.shared_bytes(problem, wanted) <= small.shared_bytes:
            assert dataclasses.replace(got, split=wanted.split) == wanted, problem
        else:
            moved += 1
            assert tiles.shared_bytes(problem, got) < tiles.shared_bytes(problem, wanted), problem
        assert got.rows * got.cols >= min(64, problem.rows) * min(64, problem.cols), (problem, got)
    assert moved or kind == "wgrad"


def test_exact_float32_takes_small_tiles_as_no_tensor_core_computes_it():
    target = targets.named("sm_90")
    for exact, tf32 in zip(problems(RESNET50, "exact"), problems(RESNET50, "tf32"), strict=True):
        ours, theirs = tiles.choose(exact, target), tiles.choose(tf32, target)
        assert ours.depth == 16 < theirs.depth and ours.rows * ours.cols <= 64 * 64, exact
        assert tiles.shared_bytes(exact, ours) < tiles.shared_bytes(tf32, theirs), exact


def test_where_nothing_fits_the_smallest_is_the_only_candidate():
    problem = _resnet50("dgrad", taps=9)[0]
    everything = tiles.candidates(problem, targets.named("sm_90"))
    (only,) = tiles.candidates(problem, Target("sm_90", KIB, 132))
    assert only in everything
    assert all(tiles.shared_bytes(problem, only) <= tiles.shared_bytes(problem, tile) for tile in everything)


def test_shared_memory_grows_with_every_side_stage_and_tensor():
    problem, tile = Problem("dgrad", 4096, 256, 256, 9, HALF, 2), tiles.Tile(64, 64, 32, 4, 3)
    least = tiles.shared_bytes(problem, tile)
    for change in ({"rows": 128}, {"cols": 128}, {"depth": 64}, {"stages": 4}):
        assert tiles.shared_bytes(problem, dataclasses.replace(tile, **change)) > least
    assert tiles.shared_bytes(dataclasses.replace(problem, loads=3), tile) > least
    assert tiles.shared_bytes(dataclasses.replace(problem, dtype=FLOAT), tile) > least


def test_targets_by_name():
    assert targets.named("sm_90") == Target("sm_90", 227 * KIB, 132)
    assert [targets.named(a).shared_bytes // KIB for a in ("sm_75", "sm_80", "sm_86", "sm_100")] == [64, 163, 99, 227]
    assert targets.named("sm_999").shared_bytes == 99 * KIB
    assert targets.named("gfx90a").shared_bytes == 64 * KIB
    assert [a for a in EVERY if targets.named(a).has_tcgen05] == ["sm_100"]
    with pytest.raises(ValueError, match="target: expected sm_<number> or gfx<name>, got 'h100'"):
        targets.named("h100")


def test_a_device_that_is_no_gpu_is_tiled_for_the_default_or_as_pretended():
    cpu = torch.device("cpu")
    with targets.pretend("sm_86") as pretended:
        assert targets.of(cpu) is pretended
        with targets.pretend("gfx942"):
            assert targets.of(cpu).arch == "gfx942"
        assert targets.of(torch.device("meta")) == targets.named("sm_86")
    assert targets.of(cpu) == targets.named(targets.DEFAULT)
