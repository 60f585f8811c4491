"""What interpreted programs may touch: bounds by the tensor a pointer came from, races, and bytes moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

SECTOR_BYTES = 32
NOBODY = -1
SEVERAL = -2


class KernelMemoryError(Exception):
    """A kernel touched memory that it must not touch, or raced with itself."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one launch moved for one tensor argument.

    ``read`` and ``written`` count each element once, ``requested_*`` each time, ``sectors_*`` the bytes of the
    32-byte sectors that each operation of a program touches.
    """

    name: str
    read: int
    written: int
    requested_read: int
    requested_written: int
    sectors_read: int
    sectors_written: int


class AccessHistory:
    """Which program wrote and read each element of one storage; every view of the storage shares it."""

    def __init__(self, length: int) -> None:
        self.writer = np.full(length, NOBODY, np.int32)
        self.reader = np.full(length, NOBODY, np.int32)
        self.atomic = np.zeros(length, bool)

    def conflict(self, kind: str, at: np.ndarray, program: int, values: np.ndarray | None) -> str:
        """The race that an access of ``program`` to the elements ``at`` makes, or an empty string."""
        writer, reader = self.writer[at], self.reader[at]
        foreign_writer = ((writer != NOBODY) & (writer != program)).any()
        if kind == "load":
            return "reads an element that another program writes in the same launch" if foreign_writer else ""
        if foreign_writer:
            return "writes an element that another program wrote"
        if kind == "atomic":
            return ""
        if ((reader == SEVERAL) | ((reader != NOBODY) & (reader != program))).any():
            return "writes an element that another program reads in the same launch"
        if self.atomic[at].any():
            return "writes an element that is also updated atomically"
        if values is not None:
            order = np.lexsort((values, at))
            same = at[order][1:] == at[order][:-1]
            if (same & (values[order][1:] != values[order][:-1])).any():
                return "writes different values to one element in one store"
        return ""

    def note(self, kind: str, at: np.ndarray, program: int) -> None:
        """Remember the access."""
        if kind == "store":
            self.writer[at] = program
        elif kind == "atomic":
            self.atomic[at] = True
        else:
            reader = self.reader[at]
            self.reader[at] = np.where((reader == NOBODY) | (reader == program), program, SEVERAL)


class TrackedTensor:
    """One tensor argument of one launch."""

    def __init__(self, tensor: Tensor, name: str, history: AccessHistory) -> None:
        self.name = f"{name} {tuple(tensor.shape)}"
        self.itemsize = tensor.element_size()
        self.base = tensor.data_ptr()
        self.history = history
        self.history_offset = tensor.storage_offset()
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        self.length = reach + 1 if tensor.numel() else 0
        self.belongs: np.ndarray | None = None
        if self.length != tensor.numel():
            inside = torch.zeros(self.length, dtype=torch.bool)
            torch.as_strided(inside, tensor.shape, tensor.stride()).fill_(True)
            self.belongs = inside.numpy()
        self.read, self.written = np.zeros(self.length, bool), np.zeros(self.length, bool)
        self.requested = {"load": 0, "store": 0}
        self.sectors = {"load": 0, "store": 0}

    def elements(self, addresses: np.ndarray, itemsize: int, kind: str, program: Any) -> np.ndarray:
        """Element offsets of ``addresses``.

        Raises:
            KernelMemoryError: an address is outside the tensor, misaligned, or between the rows of the view.
        """
        offsets = addresses.astype(np.int64) - self.base
        outside = (offsets < 0) | (offsets + itemsize > self.length * self.itemsize)
        where = f"in program {program}"
        if outside.any():
            first = int(offsets[outside][0]) // self.itemsize
            raise KernelMemoryError(
                f"out-of-bounds {kind} on {self.name} {where}: {int(outside.sum())} of {offsets.size} active lanes, "
                f"the first at element {first} of {self.length}"
            )
        if (offsets % itemsize).any():
            raise KernelMemoryError(f"misaligned {kind} on {self.name} {where}")
        at = offsets // self.itemsize
        if self.belongs is not None and not self.belongs[at].all():
            raise KernelMemoryError(f"{kind} on {self.name} {where} touches memory between the rows of the view")
        return at

    def count(self, kind: str, at: np.ndarray) -> None:
        """Add an access to the bytes moved; an atomic update reads and writes."""
        sectors = len(np.unique((at * self.itemsize + self.base) // SECTOR_BYTES)) * SECTOR_BYTES
        for direction, touched in (("load", self.read), ("store", self.written)):
            if kind in (direction, "atomic"):
                touched[at] = True
                self.requested[direction] += at.size * self.itemsize
                self.sectors[direction] += sectors

    def traffic(self) -> Traffic:
        """The bytes moved so far."""
        return Traffic(
            self.name.split(" ", maxsplit=1)[0],
            int(self.read.sum()) * self.itemsize,
            int(self.written.sum()) * self.itemsize,
            self.requested["load"],
            self.requested["store"],
            self.sectors["load"],
            self.sectors["store"],
        )


class Launch:
    """The tensor arguments of one launch and what its programs did to them."""

    def __init__(self, kernel: str, names: list[str]) -> None:
        self.kernel = kernel
        self.tensors: list[TrackedTensor] = []
        self._names = iter(names)
        self._histories: dict[tuple[int, int], AccessHistory] = {}

    def track(self, tensor: Tensor) -> TrackedTensor:
        """Register the next tensor argument."""
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.element_size())
        if key not in self._histories:
            self._histories[key] = AccessHistory(storage.nbytes() // tensor.element_size())
        self.tensors.append(TrackedTensor(tensor, next(self._names), self._histories[key]))
        return self.tensors[-1]

    @property
    def traffic(self) -> dict[str, Traffic]:
        """Bytes moved, by the kernel's parameter name."""
        return {tracked.traffic().name: tracked.traffic() for tracked in self.tensors}

    def access(
        self,
        tracked: TrackedTensor,
        addresses: np.ndarray,
        itemsize: int,
        kind: str,
        program: tuple[int, int, int],
        index: int,
        values: np.ndarray | None = None,
    ) -> None:
        """Check and record one operation of one program on the active lanes' ``addresses``.

        Raises:
            KernelMemoryError: out of bounds, misaligned, or a race.
        """
        at = tracked.elements(addresses, itemsize, kind, program)
        tracked.count(kind, at)
        absolute = at + tracked.history_offset
        if problem := tracked.history.conflict(kind, absolute, index, values):
            raise KernelMemoryError(f"race on {tracked.name}: program {program} {problem}")
        tracked.history.note(kind, absolute, index)
