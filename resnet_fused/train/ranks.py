"""Training on several processes: who this one is, what it does of a batch, and what all must agree on.

`joined` starts the process group of ``torchrun`` and ends it; everything else is a method of `Ranks`, which costs
nothing on a process on its own. Objects, counts and signals travel over gloo, gradients over NCCL where there are
GPUs. A rank that dies makes the others fail in their next exchange, at once over gloo; one that hangs, after the
timeout. Waiting for a GPU cannot be interrupted from here: there NCCL's watchdog ends the process after the timeout,
and ``torchrun`` all ranks once it sees one dead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..tuning import use_tuned
from ..tuning.ranks import from_rank_zero
from .errors import UserError
from .gradients import added

Made = TypeVar("Made")
TIMEOUT = 600.0  # seconds
_SETTLE = 3.0  # seconds that the ranks still alive are given to report before the silent ones are named
_BROKEN = ("by peer", "Timed out", "timed out", "pair closure", "Broken pipe", "NCCL", "ncclRemoteError", "Gloo")


class LostRankError(UserError):
    """Another rank died or hangs; what this one was doing is unfinished."""


class FailedElsewhereError(UserError):
    """Another rank has printed what is wrong."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Args:
        rank: 0 writes and prints.  size: how many there are.  local: this one's number on its machine.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's share of ``count`` things: contiguous, at most one more than any other's, perhaps empty."""
        least, longer = divmod(count, self.size)
        start = self.rank * least + min(self.rank, longer)
        return slice(start, start + least + (self.rank < longer))

    def total(self, values: list[float]) -> list[float]:
        """The sums over all ranks, added in float64 in the order of the ranks."""
        if self.size == 1:
            return values
        everyone = [torch.empty(len(values), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(everyone, torch.tensor(values, dtype=torch.float64))
        return added(everyone).tolist()

    def agreed(self, signal: int) -> int:
        """A signal that any rank has received, 0 for none: the same on all ranks."""
        if self.size == 1:
            return signal
        largest = torch.tensor(signal)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What ``make`` returns on rank 0, on every rank.

        Raises:
            UserError: it failed on rank 0, which raises its own error; the others raise `FailedElsewhereError`.
        """
        if self.size == 1:
            return make()
        return from_rank_zero(make, lambda why: FailedElsewhereError(f"train: failed on rank 0: {why}"))

    def together(self, make: Callable[[], Made]) -> Made:
        """What ``make`` returns on each rank; when it refuses on any, all raise. It must not talk to other ranks.

        Raises:
            UserError: its own where it was raised; `FailedElsewhereError` on the other ranks.
        """
        if self.size == 1:
            return make()
        made: Any = None
        failed: UserError | None = None
        try:
            made = make()
        except UserError as error:
            failed = error
        heard: list[str | None] = [None] * self.size
        dist.all_gather_object(heard, None if failed is None else str(failed))
        blamed = next((rank for rank, why in enumerate(heard) if why is not None), None)
        if blamed is not None and (failed is None or blamed != self.rank):
            raise FailedElsewhereError(f"train: failed on rank {blamed}: {heard[blamed]}")
        if failed is not None:
            raise failed
        return made

    def one_by_one(self, make: Callable[[], Made]) -> Made:
        """`together`, the first rank of every machine before its others: what it fetches, they find."""
        early: list[Made] = []
        self.together(lambda: early.append(make()) if self.local == 0 else None)
        return self.together(lambda: early[0] if early else make())

    def copy_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers for every rank."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


ALONE = Ranks()


def launched() -> bool:
    """Whether this process was started as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _number(variable: str) -> int:
    try:
        return int(os.environ[variable])
    except (KeyError, ValueError):
        raise UserError(
            f"train: {variable}: WORLD_SIZE is above 1, so expected a number as torchrun sets it, "
            f"got {os.environ.get(variable)!r}"
        ) from None


def _take_gpu(device: str, local: int) -> torch.device:
    """This rank's own GPU, made the current one, so that ``"cuda"`` means it."""
    if device != "cuda":
        raise UserError(f"train: --device: expected cpu or cuda, as every rank takes a GPU of its own; got {device!r}")
    have = torch.cuda.device_count()
    if local >= have:
        raise UserError(f"train: --device: expected a GPU for local rank {local}, this machine has {have}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextlib.contextmanager
def joined(device: str, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The process group that ``torchrun`` asked for by its environment, for the block; alone, nothing is started.

    Args:
        device: ``"cpu"`` or ``"cuda"``, then ``cuda:LOCAL_RANK`` is taken.
        timeout: seconds that a rank waits for another.

    Raises:
        UserError: the environment or the device does not fit.
        LostRankError: another rank died or did not answer in time.
    """
    if not launched():
        yield ALONE
        return
    if not timeout > 0:
        raise UserError(f"train: --timeout: expected a positive number of seconds, got {timeout}")
    ranks = Ranks(_number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK"))
    gpu = None if device == "cpu" else _take_gpu(device, ranks.local)
    backend, patience = "gloo" if gpu is None else "cpu:gloo,cuda:nccl", timedelta(seconds=timeout)
    store: dist.Store | None = None
    try:
        found, _, _ = next(dist.rendezvous("env://", timeout=patience))
        # torchrun keeps its store over restarts, and with it where the ranks of before could be reached.
        store = dist.PrefixStore(f"train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=patience, device_id=gpu
        )
        store.set(f"where/{ranks.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        use_tuned()
        yield ranks
    except RuntimeError as error:
        if not _is_broken(error):
            raise
        with _undisturbed():
            who = _who(store, ranks)
        raise LostRankError(f"train: rank {ranks.rank}: {who} ({_first_sentence(error)})") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_broken(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(words in str(error) for words in _BROKEN)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What ends within seconds anyway goes on through a SIGTERM: torchrun sends one when it sees a rank dead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _first_sentence(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[0].rpartition("] ")[2].partition(". ")[0]


def _who(store: dist.Store | None, ranks: Ranks) -> str:
    """Which ranks are likely lost: those that do not report within a few seconds that they miss somebody too."""
    silent = [rank for rank in range(ranks.size) if rank != ranks.rank]
    known = "lost another rank"
    with contextlib.suppress(RuntimeError):  # the store may be lost as well, with the rank that served it
        if store is None:
            return known
        store.set(f"misses/{ranks.rank}", "another")
        until = time.monotonic() + _SETTLE
        while silent and time.monotonic() < until:
            silent = [rank for rank in silent if not store.check([f"misses/{rank}"])]
            time.sleep(0.1 if silent else 0)
        if silent:
            who = [f"rank {rank}{_where(store, rank)}" for rank in silent]
            known = f"lost {' and '.join(who)}: killed, out of memory, or hanging"
    return known


def _where(store: dist.Store, rank: int) -> str:
    key = f"where/{rank}"
    return f" ({store.get(key).decode()})" if store.check([key]) else ""
