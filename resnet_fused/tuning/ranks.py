"""One table for all ranks: what rank 0 makes is what every rank gets, an error too."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .. import winners

Made = TypeVar("Made")


def joined() -> bool:
    """Whether this process is one of several that talk to each other.

    Raises:
        RuntimeError: it was started as one of several, and they do not yet.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized():
        return group.get_world_size() > 1
    if winners.distributed():
        raise RuntimeError("tune: torch.distributed: expected init_process_group before it, as WORLD_SIZE is above 1")
    return False


def _failed(why: str) -> Exception:
    return RuntimeError(f"tune: failed on rank 0: {why}")


def from_rank_zero(make: Callable[[], Made], failure: Callable[[str], Exception] = _failed) -> Made:
    """What ``make`` returns on rank 0, on every rank; alone, simply its result.

    Args:
        make: run on rank 0 only.
        failure: what the other ranks raise, made from the error of rank 0 in words.

    Raises:
        RuntimeError: it failed on rank 0, unless ``failure`` makes another error; on rank 0 its own error is raised.
    """
    if not joined():
        return make()
    group = torch.distributed
    box: list[Any] = [None]
    failed: Exception | None = None
    if group.get_rank() == 0:
        try:
            box = [("made", make())]
        except Exception as error:  # the other ranks wait: they must hear of it
            failed = error
            box = [("failed", f"{type(error).__name__}: {error}")]
    group.broadcast_object_list(box, src=0)
    if failed is not None:
        raise failed
    state, value = box[0]
    if state == "failed":
        raise failure(value)
    return value


def _devices() -> list[str]:
    """The devices of this process by name."""
    found = [winners.device_name(torch.device("cpu"))]
    if torch.cuda.is_available():
        found += [winners.device_name(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    return list(dict.fromkeys(found))


def use_tuned(cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Use what `tune` kept, for every device of this process; in a distributed one, what it kept on rank 0's machine.

    A process on its own does so by itself at the first decision. A distributed one must call this, on all ranks, after
    ``init_process_group`` and before the first step: every rank then decides by the table of rank 0.

    Args:
        cache_dir: where `tune` wrote; None: ``$RESNET_FUSED_CACHE``, else the user's cache folder. Rank 0's counts.

    Returns:
        How many decisions there are; 0 also while ``RESNET_FUSED_TUNE=0`` (rank 0's counts).

    Raises:
        RuntimeError: ``WORLD_SIZE`` is above 1 and there is no process group yet, or rank 0 failed.
    """

    def load() -> tuple[dict[str, winners.Winner], list[str]]:
        devices = _devices()
        if os.environ.get(winners.SWITCH) == "0":
            return {}, devices
        table: dict[str, winners.Winner] = {}
        for device in devices:
            table.update(winners.store.load(device, cache_dir))
        return table, devices

    table, devices = from_rank_zero(load)
    winners.replace(table, [*devices, *_devices()])
    return len(table)


def digest() -> str:
    """A hash of every measured choice in use, ``""`` without any: equal on ranks that decide alike."""
    return winners.token
