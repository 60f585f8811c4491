"""Shared by the tests of several processes: start gloo ranks once, and put together what they saw."""

from __future__ import annotations

import datetime
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.probe import _first_difference

TIMEOUT = 900  # seconds for all that the ranks of a test module do; a collective that never ends is an error before
_COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=180)

Seen = dict[str, Any]


def _one_rank(target: Callable[[int], Seen], folder: str, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=_COLLECTIVE_TIMEOUT
    )
    try:
        seen = target(rank)
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise
    torch.save(seen, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def together(target: Callable[[int], Seen], folder: Path, ranks: int) -> list[Seen]:
    """What ``target(rank)``, a function of a module, returns on every rank of a gloo group; started once, together.

    Raises:
        RuntimeError: a rank failed, or they take too long; with what the first of them said.
    """
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_one_rank, args=(target, str(folder), rank, ranks)) for rank in range(ranks)]
    for process in started:
        process.start()
    end = time.monotonic() + TIMEOUT
    while any(process.is_alive() for process in started) and not any(process.exitcode for process in started):
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    if any(process.exitcode != 0 for process in started):
        for process in started:
            process.kill()
        said = [path.read_text() for path in sorted(folder.glob("*.txt"))] or [f"no end after {TIMEOUT} s, or killed"]
        raise RuntimeError(f"ranks ended with {[process.exitcode for process in started]}: {said[0]}")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def share(whole: Tensor, batches: Sequence[int], rank: int) -> Tensor:
    """This rank's part of a batch."""
    return whole.split(list(batches))[rank]


def joined(outcomes: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The outcomes of `harness.step` on all ranks as one of the joined batch; buffers must be the same bits on each."""
    assert all(outcome.keys() == outcomes[0].keys() for outcome in outcomes)
    whole = {}
    for name, first in outcomes[0].items():
        parts = [outcome[name] for outcome in outcomes]
        if name in ("output", "input.grad"):
            whole[name] = torch.cat(parts)
        elif name.endswith(".grad"):
            whole[name] = torch.stack(parts).double().sum(0)
        else:
            assert all(torch.equal(part, first) for part in parts), f"{name} differs between ranks"
            whole[name] = first
    return whole


def assert_same_in_float64(got: dict[str, Tensor], ref: dict[str, Tensor]) -> None:
    """Two float64 evaluations of one thing, by the bound of `resnet_fused.probe`, which knows what rounding may do."""
    difference = _first_difference(got, ref)
    assert difference is None, difference
