"""Gradients of several ranks: DistributedDataParallel, which here adds them up."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def added(pieces: list[Tensor]) -> Tensor:
    """The sum of tensors, one after the other."""
    total = pieces[0].clone()
    for piece in pieces[1:]:
        total += piece
    return total


def summed(model: nn.Module, shares_statistics: bool) -> nn.Module:
    """``model`` for training on all ranks: its gradients are summed over them, not averaged.

    Args:
        model: on its device; changed in no way.
        shares_statistics: whether its batch norms are synchronised; otherwise rank 0's running statistics count.
    """
    made: Any = nn.parallel.DistributedDataParallel
    known = "forward_sync_buffers"  # the name since torch 2.14, where the one before it gives a warning
    flag = known if known in inspect.signature(made).parameters else "broadcast_buffers"
    with _unnamed_sync_norms(model):
        wrapped: nn.parallel.DistributedDataParallel = made(model, **{flag: not shares_statistics})
    # DDP compares the annotations of a hook with the classes themselves: a lambda has none.
    wrapped.register_comm_hook(None, lambda state, bucket: _sum(bucket))
    return wrapped


@contextlib.contextmanager
def _unnamed_sync_norms(model: nn.Module) -> Iterator[None]:
    """DDP refuses ``SyncBatchNorm`` on the CPU, by one look at the classes when it is made; here they can run."""
    synchronised = [m for m in model.modules() if type(m) is nn.SyncBatchNorm and not next(model.parameters()).is_cuda]
    for module in synchronised:
        module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in synchronised:
            module.__class__ = nn.SyncBatchNorm


def _sum(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A bucket's gradients summed over the ranks.

    On the CPU each rank adds one piece of the bucket in the order of the ranks and hands it out: as much traffic as a
    ring, but no sum depends on where in a bucket a gradient lies, and DDP lays its buckets anew after the first step,
    so also after the first one of a resumed run. NCCL's sums are its own.
    """
    flat = bucket.buffer()
    if flat.is_cuda:
        return dist.all_reduce(flat, async_op=True).get_future().then(lambda done: done.value()[0])
    ranks = dist.get_world_size()
    sizes = [len(piece) for piece in flat.tensor_split(ranks)]
    own = sizes[dist.get_rank()]
    pieces = flat.new_empty(ranks * own)
    dist.all_to_all_single(pieces, flat, [own] * ranks, sizes)
    total = added(list(pieces.split(own))) if own else pieces
    dist.all_to_all_single(flat, total.repeat(ranks), sizes, [own] * ranks)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(flat)
    return done
