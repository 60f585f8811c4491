"""Shared by the tests of several processes: start gloo ranks once, and put together what they saw."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TIMEOUT = 900  # seconds for all that the ranks of a test module do; a collective that never ends is an error before
_COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=180)

Seen = dict[str, Any]


def _one_rank(target: Callable[[int], Seen], folder: str, rank: int, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=_COLLECTIVE_TIMEOUT
    )
    seen = target(rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    torch.save(seen, f"{folder}/{rank}.pt")


def together(target: Callable[[int], Seen], folder: Path, ranks: int) -> list[Seen]:
    """What ``target(rank)``, a function of a module, returns on every rank of a gloo group; started once, together."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_one_rank, args=(target, str(folder), rank, ranks)) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in started] == [0] * ranks
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
