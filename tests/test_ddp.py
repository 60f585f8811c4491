"""A fused model in ``DistributedDataParallel`` over gloo: what the stock model has there, and no warning."""

from __future__ import annotations

import pytest
import torch

from .ddp_cases import FULLGRAPH, RANKS, SYNCHRONISED, WAYS, Wrapped, descend, rank_sees
from .harness import Outcome, step
from .ranks import assert_same_in_float64, joined, together
from .tune_harness import need_a_traced_chain


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What both ranks of a gloo group saw."""
    return together(rank_sees, tmp_path_factory.mktemp("ddp"), RANKS)


@pytest.mark.parametrize("name", WAYS)
def test_every_rank_has_what_the_stock_model_has_there(seen, name):
    for one in seen:
        for got, expected in zip(one["fused"][name], one["stock"][name], strict=True):
            assert_same_in_float64(got, expected)


@pytest.mark.parametrize("name", WAYS)
def test_every_rank_has_the_same_gradients(seen, name):
    first, second = (one["fused"][name] for one in seen)
    for one, other in zip(first, second, strict=True):
        gradients = [key for key in one if key.endswith(".grad") and key != "input.grad"]
        assert gradients and all(torch.equal(one[key], other[key]) for key in gradients)


def _one_process(way: Wrapped) -> list[Outcome]:
    """Plain batch norms on the joined batch, updated by the average of the ranks' gradients."""
    case = way.case()
    model, outcomes = case.model(), []
    for draw in range(2):
        outcomes.append(step(model, case.images(draw), case.gradient(draw)))
        descend(model, 1 / RANKS)
    return outcomes


@pytest.mark.parametrize("name", SYNCHRONISED)
def test_synchronised_ranks_are_one_process_on_the_joined_batch(seen, name):
    expected = _one_process(SYNCHRONISED[name])
    for i, parts in enumerate(zip(*(one["fused"][name] for one in seen), strict=True)):
        got = joined([{key.removeprefix("module."): value for key, value in part.items()} for part in parts])
        assert_same_in_float64(got, expected[i])


def test_synchronised_ranks_are_compiled_as_one_graph(seen):
    need_a_traced_chain()
    (got,) = zip(*(one["fullgraph"] for one in seen), strict=True)
    assert_same_in_float64(joined(got), step(FULLGRAPH.model(), FULLGRAPH.images(0), FULLGRAPH.gradient(0)))


def test_no_gradient_comes_in_other_strides_than_its_bucket(seen):
    for one in seen:
        assert one["warned"].pop("odd"), "the warning is not caught where it is due"
        assert not any(one["warned"].values()) and len(one["warned"]) == len(WAYS) + len(SYNCHRONISED)


def test_deep_gradients_are_ready_before_the_next_site_begins(seen):
    for one in seen:
        events = one["events"]
        sites = [i for i, (kind, _) in enumerate(events) if kind == "site"]
        assert len(sites) == 10 and len(events) == len(sites) * 4
        for begin, end in zip(sites, [*sites[1:], len(events)], strict=True):
            weight = events[begin][1]
            assert ("ready", weight) in events[begin:end]
            assert end - begin == 4, "weight and the batch norm's two, before anything of another site"
        order = [events[i][1] for i in sites if "downsample" not in events[i][1]]
        assert order == sorted(order, reverse=True)


def test_a_moving_average_of_the_wrapped_model_stays_fused_and_shares_nothing(seen):
    for one in seen:
        average = one["average"]
        assert (average["blocks"], average["shared"], average["copied"]) == (3, 0, "DistributedDataParallel")
        torch.testing.assert_close(average["fused"], average["stock"])
