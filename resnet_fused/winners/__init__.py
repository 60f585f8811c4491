"""What measurement decided: one table for the process, from a problem in words to the choice that `tune` made for it.

`plan` and `kernels.tiles` look here before they apply their rules. A table is a plain mapping; the keys name the
device, so that one table serves every device of a machine. The file of a device (`winners.store`) is read at the first
decision about it, never at import, never while ``RESNET_FUSED_TUNE=0``, and never in a distributed process: there
`tuning.use_tuned` gives every rank the table of rank 0.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from . import store
from .store import Winner, digest

__all__ = [
    "Winner",
    "device_name",
    "digest",
    "distributed",
    "lookup",
    "merge",
    "ready",
    "ready_for",
    "replace",
    "table",
    "using",
]

SWITCH = "RESNET_FUSED_TUNE"
token = ""  # the digest of the table in use, "" while it is empty: what is traced by torch.compile is guarded by it
_table: Mapping[str, Winner] = {}
_held = False  # inside `using`
_tried: set[str] = set()  # devices whose file was looked for
_own: set[str] = set()  # devices whose file this process read for itself


def table() -> dict[str, Winner]:
    """A copy of the table in use."""
    return dict(_table)


def lookup(key: str) -> Winner | None:
    """What was measured for a problem, or None; call `ready` first."""
    return _table.get(key)


def _set(new: Mapping[str, Winner]) -> None:
    global _table, token
    _table, token = new, digest(new) if new else ""


def replace(new: Mapping[str, Winner], devices: Iterable[str]) -> None:
    """Use ``new`` from now on; the files of ``devices`` are then read no more."""
    _own.clear()
    _tried.update(devices)
    _set(dict(new))


def merge(new: Mapping[str, Winner]) -> None:
    """Add to the table in use; for the same problem the new choice holds."""
    _set({**_table, **new})


@contextlib.contextmanager
def using(new: Mapping[str, Winner]) -> Iterator[None]:
    """Use exactly ``new`` in the block; ``{}`` leaves everything to the rules."""
    global _held
    previous, held, _held = _table, _held, True
    _set(dict(new))
    try:
        yield
    finally:
        _held = held
        _set(previous)


def distributed() -> bool:
    """Whether this process is one of several that train together, or was started to become one."""
    return _joined() or os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _joined() -> bool:
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def ready(device: str) -> None:
    """Read the file of ``device`` if nobody has looked for it yet; see the module's first lines for when not.

    What a process read for itself is dropped once it turns out to be one of several.
    """
    if _held:
        return
    if _own and _joined():
        _set({key: winner for key, winner in _table.items() if store.device_of(key) not in _own})
        _own.clear()
    if device in _tried or distributed():
        return
    _tried.add(device)
    if os.environ.get(SWITCH) == "0" or not device.startswith(("cpu", "cuda")):
        return
    found = store.load(device)
    if found:
        _own.add(device)
        _set({**found, **_table})


def ready_for(device: torch.device) -> bool:
    """`ready`, for a tensor's device; torch.compile runs it while it traces, file and all."""
    ready(device_name(device))
    return True


# What torch.compiler.assume_constant_result does, which imports all of the compiler.
ready_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_name(device: torch.device) -> str:
    """``"cuda: NVIDIA H100 80GB HBM3"``, ``"cpu: <model>"``: what tells one kind of device from another."""
    if device.type == "cuda":
        return _gpu_name(torch.cuda.current_device() if device.index is None else device.index)
    return _cpu_name() if device.type == "cpu" else device.type


@functools.cache
def _gpu_name(index: int) -> str:
    return f"cuda: {torch.cuda.get_device_name(index)}"


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return f"cpu: {value.strip()}"
    return f"cpu: {platform.processor() or platform.machine()}"
