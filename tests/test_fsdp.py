"""A fused model under FSDP2 (``fully_shard``) over gloo: what the stock model has under the same sharding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch.distributed.fsdp", reason="this torch is built without torch.distributed")

from resnet_fused.numerics import assert_law

from .fsdp_cases import BATCHES, PARTS, RANKS, case, rank_sees
from .harness import Outcome, step
from .ranks import assert_same_in_float64, share, together

SITES = 8  # of the trunk: the stem, three basic blocks and a projection


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What both ranks of a gloo group saw."""
    return together(rank_sees, tmp_path_factory.mktemp("fsdp"), RANKS)


@pytest.mark.parametrize("parts", PARTS)
def test_a_step_of_sgd_is_the_stock_models_under_the_same_sharding(seen, parts):
    for one in seen:
        (got, sites), (expected, _) = one["fused"][parts], one["stock"][parts]
        assert_same_in_float64(got, expected)
        assert sites == (0 if parts == "convolutions" else SITES), "a block whose inside is hooked runs as written"


@pytest.mark.parametrize("memory", ["lean", "min"])
def test_memory_modes_rebuild_from_parameters_that_were_gathered_again(seen, memory):
    for one in seen:
        got, sites = one["fused"][memory]
        assert_same_in_float64(got, one["stock"]["blocks"][0])
        assert sites == SITES


def _rounded(rank: int, dtype: torch.dtype) -> Outcome:
    """Output and gradients of one rank's images, from parameters and images rounded to bf16, without sharding."""
    given = case(torch.float32)
    model = given.model().to(torch.bfloat16).to(dtype)
    x, dout = (share(t, BATCHES, rank).bfloat16().to(dtype) for t in (given.images(0), given.gradient(0)))
    return step(model, x, dout)


def test_a_policy_of_bf16_parameters_is_held_to_the_law(seen):
    wide, half = ([_rounded(rank, dtype) for rank in range(RANKS)] for dtype in (torch.float64, torch.bfloat16))
    for rank, one in enumerate(seen):
        got, sites = one["mixed"]["fused"]
        assert sites == SITES and got["output"].dtype == torch.float32
        names = [name for name in got if name.endswith(".grad")]
        ref = {name: torch.stack([outcome[name].double() for outcome in wide]).mean(0) for name in names}
        eager = {name: torch.stack([outcome[name].float() for outcome in half]).mean(0) for name in names}
        ref["output"], eager["output"] = wide[rank]["output"], half[rank]["output"].float()
        assert_law({name: got[name] for name in ref}, ref, [eager], torch.bfloat16)
        assert all(value.dtype == torch.float32 for name, value in got.items() if "num_batches" not in name)


def test_stock_batch_norm_refuses_that_policy_on_a_cpu(seen):
    assert all("expected scalar type BFloat16 but found Float" in one["mixed"]["stock"] for one in seen)


def test_a_sharded_state_dict_goes_from_a_fused_network_to_a_stock_one(seen):
    assert all(one["loaded"] for one in seen)


def test_sharded_blocks_are_fused_by_themselves_and_explain_says_so(seen):
    explained = seen[0]["explained"]
    assert explained["kinds"] == [True, True]
    assert explained["reasons"] == [
        (True, "known network"),
        *[(True, "called by itself: hooked, wrapped or compiled alone")] * 3,
    ]


def test_fuse_after_fully_shard_is_refused_by_name(seen):
    assert "already sharded by fully_shard; call fuse first" in seen[0]["explained"]["refused"]
