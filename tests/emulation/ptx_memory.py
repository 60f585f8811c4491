"""Global and shared memory of the PTX emulator: bounds, alignment, races, bank conflicts, sectors."""

from __future__ import annotations

import collections
import ctypes

import numpy as np
from torch import Tensor

from tests.emulation.ptx_parse import PTXError, align

Stats = collections.Counter
_SEVERAL = -2


class GlobalMemory:
    """The tensors passed to a kernel; every access must lie in one of them."""

    def __init__(self, tensors: dict[str, Tensor], stats: Stats) -> None:
        self.stats = stats
        spans: list[tuple[int, int, str]] = []
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
            start, size = tensor.data_ptr(), reach * tensor.element_size() if tensor.numel() else 0
            label = f"{name} {tuple(tensor.shape)}"
            if spans and start < spans[-1][0] + spans[-1][1]:
                # Two views of one storage: an address of either is one of both.
                previous, length, other = spans.pop()
                start, size, label = previous, max(length, start + size - previous), f"{other}, {label}"
            spans.append((start, size, label))
        self.spans = [
            (*span, np.ctypeslib.as_array((ctypes.c_uint8 * span[1]).from_address(span[0]))) for span in spans
        ]
        self.touched = {kind: [np.zeros(span[1], bool) for span in spans] for kind in ("read", "written")}
        self.starts = np.array([span[0] for span in spans], np.int64)
        self.ends = np.array([span[0] + span[1] for span in spans], np.int64)

    def _locate(self, addresses: np.ndarray, width: int, text: str) -> np.ndarray:
        if not self.spans:
            raise PTXError(f"global access in a kernel without tensors: {text}")
        span = np.searchsorted(self.starts, addresses, side="right") - 1
        outside = (span < 0) | (addresses + width > self.ends[np.maximum(span, 0)])
        if outside.any():
            start, size, name, _ = self.spans[max(int(span[outside][0]), 0)]
            raise PTXError(
                f"global out-of-bounds: {int(outside.sum())} of {addresses.size} lanes, the first "
                f"{int(addresses[outside][0]) - start} bytes from the start of {name} ({size} bytes): {text}"
            )
        if (addresses % width).any():
            raise PTXError(f"misaligned global access of {width} bytes: {text}")
        return span

    def unique_bytes(self, kind: str) -> int:
        """How many bytes were ``read`` or ``written``, each once: what an unbounded cache would move."""
        return sum(int(marks.sum()) for marks in self.touched[kind])

    def _count(self, addresses: np.ndarray, width: int, warps: np.ndarray, kind: str) -> None:
        self.stats[f"global_{kind}_bytes"] += addresses.size * width
        sectors = np.unique(np.stack([warps, addresses >> 5]), axis=1).shape[1]
        self.stats[f"global_{kind}_sectors"] += sectors

    def load(self, addresses: np.ndarray, width: int, warps: np.ndarray, text: str) -> np.ndarray:
        """(lanes, width) bytes at ``addresses``."""
        span = self._locate(addresses, width, text)
        out = np.empty((addresses.size, width), np.uint8)
        for i in np.unique(span):
            chosen = span == i
            at = (addresses[chosen] - self.starts[i])[:, None] + np.arange(width)
            out[chosen] = self.spans[i][3][at]
            self.touched["read"][i][at] = True
        self._count(addresses, width, warps, "read")
        return out

    def store(self, addresses: np.ndarray, raw: np.ndarray, warps: np.ndarray, text: str) -> None:
        """Write ``raw`` (lanes, width) bytes."""
        width = raw.shape[1]
        span = self._locate(addresses, width, text)
        for i in np.unique(span):
            chosen = span == i
            at = (addresses[chosen] - self.starts[i])[:, None] + np.arange(width)
            self.spans[i][3][at] = raw[chosen]
            self.touched["written"][i][at] = True
        self._count(addresses, width, warps, "written")


class SharedMemory:
    """The shared memory of a chunk of blocks that run in lock-step, ``limit`` bytes each.

    A barrier starts a new epoch of its block. Two accesses of one epoch by different warps, at least one of them a
    write, are a race. The history is kept per two bytes.
    """

    def __init__(self, limit: int, lane_block: np.ndarray, lane_warp: np.ndarray, stats: Stats) -> None:
        self.limit, self.stats = limit, stats
        blocks, size = int(lane_block[-1]) + 1, align(limit, 16)
        self.lane_block, self.lane_warp = lane_block, lane_warp
        self.base = lane_block.astype(np.int64) * size
        self.data = np.full(blocks * size, 0xFF, np.uint8)
        self.initialised = np.zeros(blocks * size, bool)
        self.epoch = np.zeros(blocks, np.int32)
        self.writer, self.write_epoch, self.reader, self.read_epoch = (
            np.full(blocks * size // 2, -1, np.int32) for _ in range(4)
        )

    def _granules(self, at: np.ndarray, width: int, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        repeat = max(1, width // 2)
        cells = (at[:, None] // 2 + np.arange(repeat)).reshape(-1)
        return cells, np.repeat(self.lane_warp[lanes], repeat), np.repeat(self.epoch[self.lane_block[lanes]], repeat)

    def locate(self, offsets: np.ndarray, width: int, lanes: np.ndarray, write: bool, text: str) -> np.ndarray:
        """Positions in `data` of an access of ``lanes``, checked and recorded."""
        if ((offsets < 0) | (offsets + width > self.limit)).any():
            raise PTXError(f"shared out-of-bounds: {int(offsets.max())} + {width} of {self.limit} bytes: {text}")
        if (offsets % width).any():
            raise PTXError(f"misaligned shared access of {width} bytes: {text}")
        self._count_bank_conflicts(offsets, width, lanes)
        at = offsets + self.base[lanes]
        cells, warps, epochs = self._granules(at, width, lanes)
        self._raise_on(self.writer, self.write_epoch, cells, warps, epochs, "write", write, text)
        if write:
            self._raise_on(self.reader, self.read_epoch, cells, warps, epochs, "read", write, text)
            self.writer[cells], self.write_epoch[cells] = warps, epochs
        else:
            other = (self.read_epoch[cells] == epochs) & (self.reader[cells] != warps)
            self.reader[cells], self.read_epoch[cells] = warps, epochs
            self.reader[cells[other | (self.reader[cells] != warps)]] = _SEVERAL
        return at

    def _raise_on(
        self,
        who: np.ndarray,
        when: np.ndarray,
        cells: np.ndarray,
        warps: np.ndarray,
        epochs: np.ndarray,
        before: str,
        write: bool,
        text: str,
    ) -> None:
        if ((when[cells] == epochs) & (who[cells] != warps)).any():
            now = "write" if write else "read"
            raise PTXError(f"shared-memory race: {now} after {before} by another warp without a barrier: {text}")

    def load(self, offsets: np.ndarray, width: int, lanes: np.ndarray, text: str) -> np.ndarray:
        """(lanes, width) bytes."""
        at = self.locate(offsets, width, lanes, False, text)[:, None] + np.arange(width)
        self.require_initialised(at, text)
        return self.data[at]

    def store(self, offsets: np.ndarray, raw: np.ndarray, lanes: np.ndarray, text: str) -> None:
        """Write ``raw`` (lanes, width) bytes."""
        width = raw.shape[1]
        at = self.locate(offsets, width, lanes, True, text)[:, None] + np.arange(width)
        self.place(at, raw)
        if (self.data[at] != raw).any():
            raise PTXError(f"shared-memory race: different values written to one element at once: {text}")

    def place(self, at: np.ndarray, raw: np.ndarray) -> None:
        """Put bytes at positions from `locate`."""
        self.data[at], self.initialised[at] = raw, True

    def arrive(self, at: np.ndarray, raw: np.ndarray, lanes: np.ndarray) -> None:
        """The bytes of an asynchronous copy land: other warps need a barrier after this moment."""
        self.place(at[:, None] + np.arange(raw.shape[1]), raw)
        cells, warps, epochs = self._granules(at, raw.shape[1], lanes)
        self.writer[cells], self.write_epoch[cells] = warps, epochs

    def require_initialised(self, at: np.ndarray, text: str) -> None:
        """Raise where a byte was never written, or is of a copy not waited for."""
        if not self.initialised[at].all():
            raise PTXError(f"shared memory read before it is written, or its cp.async waited for: {text}")

    def gather(self, address: np.ndarray, first_lane: np.ndarray, text: str) -> np.ndarray:
        """Bytes that the tensor cores read for the warpgroups that begin at ``first_lane``; a write needs a barrier
        first. ``address`` is (warpgroups, ...)."""
        if ((address < 0) | (address >= self.limit)).any():
            raise PTXError(f"shared out-of-bounds through a matrix descriptor: {text}")
        lead = [-1] + [1] * (address.ndim - 1)
        at = address + self.base[first_lane].reshape(lead)
        self.require_initialised(at, text)
        epoch = self.epoch[self.lane_block[first_lane]].reshape(lead)
        if (self.write_epoch[at // 2] == epoch).any():
            raise PTXError(f"shared-memory race: wgmma reads what was written without a barrier: {text}")
        self.reader[at // 2], self.read_epoch[at // 2] = _SEVERAL, epoch
        return self.data[at]

    def _count_bank_conflicts(self, offsets: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """Add cycles: a warp's access goes in 1, 2 or 4 phases of 128 bytes; a phase costs its busiest bank's words."""
        phases = max(1, width // 4)
        order = np.argsort(lanes, kind="stable")
        offsets, lanes = offsets[order], lanes[order]
        phase = self.lane_warp[lanes].astype(np.int64) * 8 + lanes % 32 * phases // 32
        words = (offsets[:, None] // 4 + np.arange(phases)).reshape(-1)
        unique = np.unique(np.repeat(phase, phases) << 32 | words)
        banks, loads = np.unique((unique >> 32) * 32 + (unique & 0xFFFFFFFF) % 32, return_counts=True)
        starts = np.flatnonzero(np.r_[True, np.diff(banks // 32) != 0])
        self.stats["shared_cycles"] += int(np.maximum.reduceat(loads, starts).sum())
        self.stats["shared_ideal_cycles"] += len(starts)
