"""Measured choices in a distributed process: every rank decides by rank 0's table, or by none."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from resnet_fused import plan, tune, use_tuned, winners
from resnet_fused.plan import ConvShape
from resnet_fused.tuning import digest, ranks
from resnet_fused.winners import Winner, store
from tests.tune_harness import cpu_name, forget, images, no_winners, shortcut_block

__all__ = ["no_winners"]
SHAPE = ConvShape(2, 8, 5, 4, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, torch.bfloat16, False)
RANKS = 2


def refused(model=None):
    """What rank 0 says and the other hears when a tune cannot be done."""
    try:
        tune(shortcut_block() if model is None else model, images(), memory="huge", time_limit=2)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def synchronised():
    try:
        tune(torch.nn.SyncBatchNorm.convert_sync_batchnorm(shortcut_block()), images())
    except ValueError as error:
        return str(error)
    return "nothing"


def one_rank(rank: int, folder: str) -> None:
    """What one rank sees, step by step, written to ``<folder>/<rank>.json``."""
    torch.set_num_threads(1)
    os.environ[store.VARIABLE] = f"{folder}/cache-{rank}"
    os.environ.pop(winners.SWITCH, None)
    plan.choose(SHAPE)
    seen = {"alone": plan.choose(SHAPE).name}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    seen["joined"], seen["nothing shared"] = plan.choose(SHAPE).reason, digest()
    seen["count"] = use_tuned()
    seen["shared"], seen["digest"] = plan.choose(SHAPE).reason, digest()
    os.environ[winners.SWITCH] = "0" if rank == 0 else ""
    seen["off"] = use_tuned()
    del os.environ[winners.SWITCH]
    use_tuned()
    seen["refused"], seen["synchronised"] = refused(), synchronised()
    report = tune(shortcut_block(), images(), time_limit=2)
    seen["tuned"], seen["said"], seen["written"] = digest(), report.digest, report.written
    seen["table"] = sorted(winners.table())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What both ranks of a gloo group saw, whose cache folders hold different files."""
    folder = tmp_path_factory.mktemp("ranks")
    key = plan.problem_key(SHAPE, "triton").replace(f"{torch.get_num_threads()} threads", "1 threads")
    for rank, choice in enumerate(("library", "own")):
        path = folder / f"cache-{rank}"
        store.save(cpu_name(), {key: Winner(choice, f"measured on rank {rank}")}, path)
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=one_rank, args=(rank, str(folder))) for rank in range(RANKS)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_alone_a_process_reads_its_own_file_and_drops_it_once_it_is_one_of_several(seen):
    assert [one["alone"] for one in seen] == ["library", "own"]
    assert not [one for one in seen if "measured" in one["joined"] or one["nothing shared"]]


def test_use_tuned_gives_every_rank_the_table_of_rank_0(seen):
    assert [one["count"] for one in seen] == [1, 1]
    assert [one["shared"] for one in seen] == ["measured on rank 0"] * RANKS
    assert seen[0]["digest"] == seen[1]["digest"] != ""


def test_the_switch_of_rank_0_counts(seen):
    assert [one["off"] for one in seen] == [0, 0]


def test_after_tune_all_ranks_hold_what_rank_0_measured(seen):
    assert len({*(one["tuned"] for one in seen), *(one["said"] for one in seen)}) == 1
    assert seen[0]["table"] == seen[1]["table"] and len(seen[0]["table"]) >= 1
    assert {one["written"] for one in seen} == {seen[0]["written"]}
    assert seen[0]["written"] is None or "cache-0" in seen[0]["written"]


def test_an_error_of_rank_0_is_raised_on_every_rank(seen):
    assert seen[0]["refused"].startswith("ValueError: fuse: memory: expected one of")
    assert seen[1]["refused"].startswith("RuntimeError: tune: failed on rank 0: ValueError: fuse: memory")


def test_synchronised_batch_norm_is_refused(seen):
    assert all(one["synchronised"].startswith("tune: model: expected no SyncBatchNorm") for one in seen)


def test_started_as_one_of_several_without_a_group_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (use_tuned, lambda: tune(shortcut_block(), images())):
        with pytest.raises(RuntimeError, match="expected init_process_group before it, as WORLD_SIZE is above 1"):
            call()
    assert ranks.digest() == ""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert use_tuned() == 0


def test_alone_use_tuned_reads_the_folder_that_is_named(tmp_path):
    store.save(cpu_name(), {f"{cpu_name()} | p": Winner("own", "measured")}, tmp_path)
    assert use_tuned(tmp_path) == 1 and digest() == store.digest(winners.table())
    assert use_tuned() == 0 and digest() == ""
    forget()
