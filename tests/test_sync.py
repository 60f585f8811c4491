"""``SyncBatchNorm`` in the chain: N processes are one process with plain batch norms on the joined batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet_fused import explain, fuse
from resnet_fused.numerics import assert_law, judge_all

from .harness import LAYOUTS, Outcome, step
from .ranks import assert_same_in_float64, joined, share, together
from .sync_cases import (
    CASES,
    EMPTY,
    MORE_CASES,
    RANKS,
    TRITON_CASES,
    UNEVEN,
    Case,
    more_cases_on,
    rank_sees,
    triton_cases_on,
)
from .tune_harness import need_a_traced_chain

SITES = 10  # in the stage of `sync_cases`


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the ranks of a gloo group saw."""
    return together(rank_sees, tmp_path_factory.mktemp("sync"), RANKS)


@pytest.fixture(scope="module")
def more_seen(tmp_path_factory):
    """The same for the cases of the full suite."""
    return together(more_cases_on, tmp_path_factory.mktemp("more"), RANKS)


def alone(case: Case, draw: int, batches: tuple[int, ...] | None = None) -> tuple[Outcome, list[Outcome]]:
    """One process with plain batch norms on the joined batch: in float64, and eager in both layouts."""
    x, dout = case.images(draw), case.gradient(draw)
    if batches is not None:
        x, dout = (torch.cat([share(t, UNEVEN, rank) for rank in batches]) for t in (x, dout))
    stock = case.model()
    eager = [
        step(copy.deepcopy(stock).to(memory_format=layout), x.contiguous(memory_format=layout), dout)
        for layout in LAYOUTS.values()
    ]
    return step(stock.double(), x.double(), dout), eager


def _stacked(outcomes: list[Outcome]) -> Outcome:
    return {name: torch.stack([outcome[name] for outcome in outcomes]) for name in outcomes[0]}


def hold_together(case: Case, seen: list[list[Outcome]]) -> None:
    """The ranks' outcomes of every draw; but for float64 by the law, as `harness.hold_to_law` applies it."""
    got = [joined(parts) for parts in zip(*seen, strict=True)]
    if case.dtype == torch.float64:
        for draw, outcome in enumerate(got):
            assert_same_in_float64(outcome, alone(case, draw)[0])
        return
    for draws in (1, case.draws):
        refs, eager = zip(*(alone(case, draw) for draw in range(draws)), strict=True)
        expected = _stacked(list(refs))
        both = [_stacked(list(runs)) for runs in zip(*eager, strict=True)]
        if all(verdict.passed for verdict in judge_all(_stacked(got[:draws]), expected, both, case.dtype)):
            return
    assert_law(_stacked(got), expected, both, case.dtype)


@pytest.mark.parametrize("name", CASES)
def test_the_ranks_together_are_one_process_on_the_joined_batch(seen, name):
    hold_together(CASES[name], [one["cases"][name] for one in seen])


@pytest.mark.full
@pytest.mark.parametrize("name", MORE_CASES)
def test_more_ranks_together_are_one_process_on_the_joined_batch(more_seen, name):
    if MORE_CASES[name].compiled:
        need_a_traced_chain()
    hold_together(MORE_CASES[name], [one["cases"][name] for one in more_seen])


@pytest.mark.full
def test_the_triton_engines_kernels_take_part(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    from resnet_fused.compiling import offline

    if offline.missing_tools():
        pytest.skip(offline.missing_tools())
    every = together(triton_cases_on, tmp_path, RANKS)
    for name, case in TRITON_CASES.items():
        hold_together(case, [one["cases"][name] for one in every])
    for rank, images in enumerate(EMPTY):
        ours = {"_conv_fwd_kernel", "_conv_dgrad_kernel", "_conv_wgrad_kernel"}
        assert ours <= every[rank]["kernels"] or images == 0


def test_each_site_has_one_collective_each_way_in_every_memory_mode(seen):
    for one in seen:
        for memory in ("speed", "lean", "min"):
            counted = one["counted"][f"{memory} train"]
            assert counted["forward"] == ["all_gather_into_tensor"] * SITES
            assert counted["backward"] == ["all_reduce"] * SITES


def test_eval_mode_has_no_collective(seen):
    assert all(one["counted"]["speed eval"] == {"forward": [], "backward": []} for one in seen)


def test_a_batch_norm_is_synchronised_in_its_own_group(seen):
    case = Case("bottleneck")
    for members in ((0, 1), (2,)):
        ref, _ = alone(case, 0, members)
        assert_same_in_float64(joined([seen[rank]["subgroups"] for rank in members]), ref)


class Apart(nn.BatchNorm2d):
    """A batch norm that takes the statistics of every rank's rows alone, as one that is not synchronised does."""

    def forward(self, x):
        """Each part from the same running statistics; ``after`` is what they are on each rank."""
        before = dict(self.named_buffers())
        outputs, self.after = [], []
        for part in x.split(UNEVEN):
            self._buffers.update({name: value.clone() for name, value in before.items()})
            outputs.append(super().forward(part))
            self.after.append(dict(self.named_buffers()))
        return torch.cat(outputs)


def test_a_plain_batch_norm_beside_synchronised_ones_stays_alone(seen):
    case = Case("basic")
    model = case.model()
    model.bn2.__class__ = Apart
    ref = step(model, case.images(0), case.gradient(0))
    for rank, one in enumerate(seen):
        for name, value in model.bn2.after[rank].items():
            assert_same_in_float64({name: one["mixed"].pop(f"bn2.{name}")}, {name: value.double()})
            ref.pop(f"bn2.{name}", None)
    assert_same_in_float64(joined([one["mixed"] for one in seen]), ref)


def test_one_value_on_all_ranks_together_is_refused_on_each_and_moves_nothing(seen):
    for one in seen:
        assert one["one value in all"].startswith("ValueError: Expected more than 1 value per channel when training")
        assert one["unmoved"]


def test_stock_refuses_the_cpu_where_ours_runs(seen):
    assert all("expected input tensor to be on GPU" in one["stock"] for one in seen)


def test_the_probe_needs_no_other_rank(seen):
    assert seen[0]["probing"] == ([], True)


def test_explain_says_over_how_many_processes(seen):
    assert seen[0]["explained"][0] == (True, f"known network; SyncBatchNorm over {RANKS} processes")
    assert set(seen[0]["explained"][1:]) == {(True, f"recognised; SyncBatchNorm over {RANKS} processes")}
    assert seen[0]["sites"] == 8


def test_without_a_process_group_it_is_a_batch_norm():
    case = Case("trunk")
    x, dout = case.images(0), case.gradient(0)
    want = step(fuse(case.model()), x, dout)
    for first in (False, True):
        model = Case("trunk", converted_first=first).fused()
        assert {record.reason for record in explain(model).blocks[1:]} == {
            "recognised; SyncBatchNorm as BatchNorm2d: no process group"
        }
        got = step(model, x, dout)
        assert all(torch.equal(got[name], want[name]) for name in want) and got.keys() == want.keys()


def test_a_subclass_of_sync_batch_norm_runs_as_it_was_written():
    class Own(nn.SyncBatchNorm):
        pass

    block = Case("basic").fused()
    block.bn1.__class__ = Own
    with pytest.warns(UserWarning, match="bn1 is a Own, which the chain does not run"):
        block(torch.ones(2, 8, 7, 6, dtype=torch.float64))
