"""One line of the kernel table: what the compiler made of a kernel, and which bounds it breaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ..kernels.launch import LaunchRecord
from .offline import MULTIPROCESSOR, SHARED_LIMIT, CompiledKernel, Failure


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel, configuration, dtype and target, in plain numbers; sizes in bytes.

    Args:
        used_by: what launches it, such as ``resnet50 train``.
        blocks: resident blocks on one multiprocessor, None where the target's are not modelled (AMD).
        occupancy: resident warps over the most there can be, 0 to 1, or None likewise.
        wide_loads, wide_stores, wide_copies: accesses of 128 bits, asynchronous copies among the loads.
        moved, flops: bytes that its largest launch reads and writes, each tensor once, and FLOPs of its product.
        broken: the bounds it breaks, in words.
    """

    kernel: str
    target: str
    dtype: str
    config: dict[str, Any]
    used_by: tuple[str, ...]
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    shared_limit: int
    blocks: int | None
    occupancy: float | None
    tensor_core: str
    wide_loads: int
    wide_stores: int
    cp_async: int
    wide_copies: int
    broken: tuple[str, ...]
    key: str
    moved: int = 0
    flops: int = 0

    @property
    def intensity(self) -> float | None:
        """FLOPs for each byte moved; None without a matrix product."""
        return self.flops / self.moved if self.flops and self.moved else None

    def tile(self) -> str:
        """The configuration as one word, block sizes and options first: it is what `tune` chooses."""
        blocks = "x".join(str(value) for name, value in self.config.items() if name.startswith("BLOCK"))
        return f"{blocks or '-'} w{self.num_warps} s{self.num_stages}"

    def geometry(self) -> str:
        """The rest of the configuration."""
        hidden = ("num_warps", "num_stages")
        rest = (item for item in self.config.items() if item[0] not in hidden and not item[0].startswith("BLOCK"))
        return " ".join(f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in rest)


def broken_bounds(kernel: CompiledKernel) -> tuple[str, ...]:
    """Which bounds a compiled kernel breaks, in words; nothing when it may ship."""
    found = []
    if kernel.spill_loads or kernel.spill_stores:
        found.append(f"spills ({kernel.spill_loads} loads, {kernel.spill_stores} stores)")
    if kernel.stack_bytes or kernel.local_bytes:
        found.append(f"local memory ({max(kernel.stack_bytes, kernel.local_bytes)} bytes)")
    if not kernel.launches:
        found.append(f"shared memory over the limit ({kernel.shared_bytes} of {SHARED_LIMIT[kernel.target]} bytes)")
    elif kernel.target in MULTIPROCESSOR and not kernel.blocks_per_multiprocessor():
        found.append("no block fits a multiprocessor")
    if kernel.wants_tensor_core and kernel.tensor_core == "none":
        found.append("no tensor core")
    return tuple(found)


def describe(kernel: CompiledKernel, dtype: str, used_by: str) -> Row:
    """The table's line for one compiled kernel."""
    resident = kernel.target in MULTIPROCESSOR and kernel.launches
    return Row(
        kernel.name,
        kernel.target,
        dtype,
        kernel.config,
        (used_by,),
        kernel.num_warps,
        kernel.num_stages,
        kernel.registers,
        kernel.spill_loads + kernel.spill_stores,
        kernel.stack_bytes,
        kernel.local_bytes,
        kernel.shared_bytes,
        SHARED_LIMIT[kernel.target],
        kernel.blocks_per_multiprocessor() if resident else None,
        kernel.occupancy() if resident else None,
        kernel.tensor_core,
        kernel.wide_loads,
        kernel.wide_stores,
        kernel.cp_async,
        kernel.wide_copies,
        broken_bounds(kernel),
        kernel.key,
    )


def failed(failure: Failure, dtype: str, used_by: str) -> Row:
    """The table's line for a launch that does not compile."""
    words = (str(failure.error).strip().splitlines() or [""])[-1]
    counts = (
        "registers",
        "spills",
        "stack_bytes",
        "local_bytes",
        "shared_bytes",
        "wide_loads",
        "wide_stores",
        "cp_async",
        "wide_copies",
    )
    return Row(
        kernel=failure.name,
        target=failure.target,
        dtype=dtype,
        config=failure.config,
        used_by=(used_by,),
        num_warps=failure.config.get("num_warps", 0),
        num_stages=failure.config.get("num_stages", 0),
        shared_limit=SHARED_LIMIT[failure.target],
        blocks=None,
        occupancy=None,
        tensor_core="none",
        broken=(f"does not compile: {type(failure.error).__name__}: {words}",),
        key=_launched(failure.name, failure.config),
        **dict.fromkeys(counts, 0),
    )


def weighed(rows: Iterable[Row], launches: Iterable[LaunchRecord]) -> list[Row]:
    """The rows with what the largest launch of each kernel and configuration moves and computes."""
    largest: dict[str, LaunchRecord] = {}
    for launch in launches:
        key = _launched(launch.kernel, launch.config)
        if key not in largest or launch.moved > largest[key].moved:
            largest[key] = launch
    found = []
    for row in rows:
        known = largest.get(_launched(row.kernel, row.config))
        found.append(row if known is None else dataclasses.replace(row, moved=known.moved, flops=known.flops))
    return found


def _launched(kernel: str, config: Mapping[str, Any]) -> str:
    return f"{kernel} {sorted(config.items())}"


def merge(rows: Iterable[Row]) -> list[Row]:
    """One row per compiled kernel, with all that launches it; those that break a bound first."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        known = found.get((row.key, row.dtype))
        if known is not None:
            used_by = tuple(dict.fromkeys((*known.used_by, *row.used_by)))
            row = dataclasses.replace(max(known, row, key=lambda r: r.moved), used_by=used_by)
        found[row.key, row.dtype] = row
    return sorted(found.values(), key=lambda row: (not row.broken, row.kernel, row.target, row.dtype))
