"""The plan's rules as a pure function: every rule and its reason, what may be forced, and what is remembered."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from resnet_fused import plan
from resnet_fused.plan import ConvShape, Variant

HALF, FLOAT = torch.bfloat16, torch.float32
PLAIN = ConvShape(32, 64, 56, 56, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, HALF, False)


@pytest.fixture(autouse=True)
def nothing_refused(monkeypatch):
    monkeypatch.setattr(plan, "_refused", {})


def shape(**changes):
    return dataclasses.replace(PLAIN, **changes)


FASTER = [
    ("bf16", {}),
    ("fp16", {"dtype": torch.float16}),
    ("fp32 in TF32", {"dtype": FLOAT, "tf32": True}),
    ("1x1", {"filter": (1, 1), "padding": (0, 0)}),
    ("5x5", {"filter": (5, 5), "padding": (2, 2)}),
    ("1x7", {"filter": (1, 7), "padding": (0, 3)}),
    ("strided", {"stride": (2, 2)}),
    ("dilated", {"dilation": (2, 2)}),
    ("an image of one channel", {"c": 1}),
    ("an image of three channels", {"c": 3, "filter": (7, 7)}),
    ("an image of four channels", {"c": 4}),
    ("channels of 16 bytes in bf16", {"c": 8, "k": 8}),
    ("channels of 16 bytes in TF32", {"c": 12, "k": 4, "dtype": FLOAT, "tf32": True}),
    ("an empty batch", {"n": 0}),
    ("the last pixel that 32 bits number", {"n": 1, "h": 2**16 - 5, "w": 2**15 - 2}),
]
SLOWER = [
    ("exact fp32", {"dtype": FLOAT}, "exact float32 uses no tensor core"),
    ("even filter", {"filter": (2, 2)}, "a filter of 2x2"),
    ("filter too large", {"filter": (3, 9)}, "a filter of 3x9"),
    ("odd input channels", {"c": 20}, "20 or 64 channels are no multiple of 16 bytes"),
    ("odd output channels", {"k": 66}, "64 or 66 channels are no multiple of 16 bytes"),
    ("odd output channels of an image", {"c": 3, "k": 10}, "3 or 10 channels are no multiple of 16 bytes"),
    ("odd channels in TF32", {"c": 6, "dtype": FLOAT, "tf32": True}, "6 or 64 channels are no multiple of 16 bytes"),
]
IMPOSSIBLE = [
    ("groups", {"groups": 4}, "4 groups"),
    ("too many pixels", {"n": 2**10, "h": 2**10, "w": 2**11}, "more pixels than 32 bits number"),
    ("too many with the rows' padding", {"n": 1, "h": 2**16 - 4, "w": 2**15 - 2}, "more pixels than 32 bits number"),
    ("too many with the columns' padding", {"n": 1, "h": 2**15 - 2, "w": 2**16 - 4}, "more pixels than 32 bits number"),
]


@pytest.mark.parametrize("changes", [pytest.param(c, id=name) for name, c in FASTER])
def test_our_kernels_run_what_they_are_made_for(changes):
    assert plan.choose(shape(**changes)) == Variant("own", "batch norm, ReLU and statistics inside the convolution")


@pytest.mark.parametrize(("changes", "reason"), [pytest.param(c, r, id=name) for name, c, r in SLOWER + IMPOSSIBLE])
def test_the_library_runs_the_rest_and_says_why(changes, reason):
    assert plan.choose(shape(**changes)) == Variant("library", reason)


@pytest.mark.parametrize("changes", [pytest.param(c, id=name) for name, c, _ in SLOWER])
def test_a_rule_of_speed_gives_way_to_force(changes):
    with plan.force("own"):
        assert plan.choose(shape(**changes)) == Variant("own", "forced")


@pytest.mark.parametrize(("changes", "reason"), [pytest.param(c, r, id=name) for name, c, r in IMPOSSIBLE])
def test_what_cannot_run_cannot_be_forced(changes, reason):
    with plan.force("own"):
        assert plan.choose(shape(**changes)) == Variant("library", reason)


def test_force_holds_in_its_block_alone():
    with plan.force("library"):
        assert plan.choose(PLAIN) == Variant("library", "forced")
        with plan.force(None):
            assert plan.choose(PLAIN).name == "own"
        with pytest.raises(RuntimeError, match="left"), plan.force("own"):
            raise RuntimeError("left")
        assert plan.choose(PLAIN).name == "library"
    assert plan.choose(PLAIN).name == "own"


def test_force_refuses_a_name_that_is_no_variant():
    with pytest.raises(ValueError, match=r"plan\.force: name: expected 'own', 'library' or None, got 'fast'"):
        plan.force("fast").__enter__()


def test_a_refusal_is_of_one_shape_and_outlives_force():
    plan.refuse(PLAIN, "OutOfResources: too much")
    with plan.force("own"):
        assert plan.choose(dataclasses.replace(PLAIN)) == Variant("library", "OutOfResources: too much")
        assert plan.choose(shape(n=31)).name == "own"
    assert plan.choose(shape(dtype=torch.float16)).name == "own"


def test_the_choice_depends_on_the_shape_alone():
    shapes = [shape(**changes) for _, changes, *_ in (*FASTER, *SLOWER, *IMPOSSIBLE)]
    first = [plan.choose(s) for s in shapes]
    with plan.force("library"):
        [plan.choose(s) for s in shapes]
    assert [plan.choose(s) for s in reversed(shapes)] == first[::-1]
