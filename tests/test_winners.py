"""The table of measured choices: who looks it up, and what goes before it."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

from resnet_fused import fuse, plan, projection, winners
from resnet_fused.calls import SiteCall
from resnet_fused.kernels import target, tiles
from resnet_fused.plan import ConvShape, Variant
from resnet_fused.winners import Winner, store
from tests.harness import hold_to_law
from tests.test_projected import called
from tests.tune_harness import cpu_name, images, need_a_traced_chain, needs_ops, no_winners, shortcut_block

__all__ = ["no_winners"]

HALF = torch.bfloat16
DEVICE = "cuda: a GPU"
SHAPE = ConvShape(32, 64, 56, 56, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, HALF, False, 0, DEVICE)
MEASURED = Winner("library", "measured: own 0.61 ms, library 0.42 ms")


def shortcut_key(x, threads=None):
    call = SiteCall("cpu", (2, 2), (0, 0), (1, 1), 1, False, True, 0.1, 1e-5, projection=True)
    return plan.problem_key(plan.shape_of_call(call, x, torch.empty(8, 12, 1, 1)), "cpu")


def test_a_winner_goes_before_the_rules_and_says_so():
    assert plan.choose(SHAPE).name == "own"
    winners.merge({plan.problem_key(SHAPE, "triton"): MEASURED})
    assert plan.choose(SHAPE) == Variant("library", MEASURED.words)
    slow = dataclasses.replace(SHAPE, dtype=torch.float32)
    winners.merge({plan.problem_key(slow, "triton"): Winner("own", "measured")})
    assert plan.choose(slow) == Variant("own", "measured")


def test_what_cannot_run_and_force_go_before_a_winner():
    grouped = dataclasses.replace(SHAPE, groups=4)
    winners.merge({plan.problem_key(s, "triton"): Winner("own", "measured") for s in (SHAPE, grouped)})
    assert plan.choose(grouped) == Variant("library", "4 groups")
    with plan.force("library"):
        assert plan.choose(SHAPE) == Variant("library", "forced")
    plan.refuse(SHAPE, "too much shared memory")
    assert plan.choose(SHAPE) == Variant("library", "too much shared memory")


CHANGES = {
    "n": 31, "c": 32, "h": 55, "w": 55, "k": 32, "filter": (1, 1), "stride": (2, 2), "padding": (0, 0),
    "dilation": (2, 2), "groups": 2, "dtype": torch.float16, "tf32": True, "projection": 1, "device": "cuda: another",
}  # fmt: skip


def test_every_field_of_a_shape_is_in_its_key():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(ConvShape)}
    keys = {plan.problem_key(dataclasses.replace(SHAPE, **{name: value}), "triton") for name, value in CHANGES.items()}
    keys |= {plan.problem_key(dataclasses.replace(SHAPE, projection=2), "triton"), plan.problem_key(SHAPE, "cpu")}
    assert len(keys | {plan.problem_key(SHAPE, "triton")}) == len(CHANGES) + 3


def test_threads_are_in_the_key_of_a_cpu():
    x = images()
    torch.set_num_threads(1)
    one = shortcut_key(x)
    torch.set_num_threads(2)
    assert shortcut_key(x) != one


def test_every_field_of_a_product_is_in_the_key_of_its_tile():
    problem, sm_90 = tiles.Problem("fwd", 6272, 64, 64, 9, HALF), target.named("sm_90")
    changes = {"kind": "dgrad", "rows": 1, "cols": 1, "depth": 1, "taps": 1, "dtype": torch.half, "loads": 2}
    changes["exact"] = True
    assert set(changes) == {field.name for field in dataclasses.fields(tiles.Problem)}
    keys = {tiles.problem_key(dataclasses.replace(problem, **{n: v}), sm_90) for n, v in changes.items()}
    keys |= {tiles.problem_key(problem, t) for t in (sm_90, dataclasses.replace(sm_90, name=DEVICE))}
    assert len(keys) == len(changes) + 2


def test_a_measured_tile_is_chosen_where_it_fits():
    problem, sm_90 = tiles.Problem("wgrad", 64, 64, 6272, 9, HALF), target.named("sm_90")
    first, second = tiles.candidates(problem, sm_90)[:2]
    key = tiles.problem_key(problem, sm_90)
    assert tiles.choose(problem, sm_90) == first
    winners.merge({key: Winner(tiles.as_choice(second), "measured")})
    assert tiles.choose(problem, sm_90) == second
    huge = dataclasses.replace(first, rows=4096)
    for choice in (tiles.as_choice(huge), (1, 2), "own", (48, 64, 64, 4, 2, 1)):
        winners.merge({key: Winner(choice, "measured")})
        assert tiles.choose(problem, sm_90) == first


@needs_ops
def test_a_measured_shortcut_is_what_runs():
    x = images()
    assert len(called(fuse(shortcut_block()), x)) == 2  # the input needs no gradient
    winners.merge({shortcut_key(x): MEASURED})
    assert called(fuse(shortcut_block()), x) == []
    assert len(called(fuse(shortcut_block()), x[:1])) == 2
    with winners.using({}):
        assert len(called(fuse(shortcut_block()), x)) == 2
    assert called(fuse(shortcut_block()), x) == []


@needs_ops
@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
def test_a_measured_shortcut_obeys_the_law(memory):
    winners.merge({shortcut_key(images()): MEASURED})
    fused = hold_to_law(shortcut_block(), images(), torch.float32, memory=memory)
    assert called(fused, images()) == []


@needs_ops
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph_with_winners_read_while_tracing(dynamic):
    need_a_traced_chain()
    x = images()
    store.save(cpu_name(), {shortcut_key(x): MEASURED}, store.folder())
    compiled = torch.compile(fuse(shortcut_block()), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    seen = []
    with mock.patch.object(plan, "shortcut", lambda *a, real=plan.shortcut: seen.append(real(*a)) or seen[-1]):
        got = compiled(x)
    assert {variant.name for variant in seen} == (set() if dynamic else {"library"})
    assert winners.token == winners.digest({shortcut_key(x): MEASURED})
    assert torch.equal(got, fuse(shortcut_block())(x)) or dynamic


@needs_ops
def test_compiled_code_follows_a_new_table():
    need_a_traced_chain()
    x, seen = images(), []
    compiled = torch.compile(fuse(shortcut_block()), fullgraph=True, backend="aot_eager")
    with mock.patch.object(
        projection, "projection_fwd", lambda *a, f=projection.projection_fwd: seen.append(1) or f(*a)
    ):
        compiled(x)
        assert seen
        seen.clear()
        winners.merge({shortcut_key(x): MEASURED})
        compiled(x)
        assert not seen
