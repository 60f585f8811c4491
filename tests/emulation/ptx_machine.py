"""The PTX emulator's control: lanes of many blocks in lock-step, divergence, barriers, registers and operands.

All lanes of a chunk of blocks run together; where they diverge, those at the lowest instruction go first, which
joins them again at the earliest common one. Instructions are functions in `OPERATIONS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np

from tests.emulation.ptx_memory import GlobalMemory, SharedMemory, Stats
from tests.emulation.ptx_parse import NUMPY, SIZES, UNSIGNED, Instruction, Kernel, PTXError, align

Operation = Callable[["Machine", Instruction], None]
OPERATIONS: dict[str, Operation] = {}
WARP = 32
_LITERAL = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
_ADDRESS = re.compile(r"\[?\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]?$")


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Register the function that executes the instructions ``names``."""

    def register(function: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def vector(operand: str) -> list[str]:
    """``{a, b}`` or ``a`` as a list."""
    return [item.strip() for item in operand.strip("{}").split(",")]


class Machine:
    """One launch. ``lanes_per_chunk`` bounds how many threads run together."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        parameters: bytes,
        memory: GlobalMemory,
        dynamic_shared: int,
        stats: Stats,
        lanes_per_chunk: int = 8192,
    ) -> None:
        if threads % WARP:
            raise PTXError(f"expected a multiple of {WARP} threads, got {threads}")
        self.kernel, self.grid, self.threads, self.memory, self.stats = kernel, grid, threads, memory, stats
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.parameter_offsets = {p.name: p.offset for p in kernel.parameters}
        static = align(kernel.static_shared, 128) if kernel.static_shared else 0
        self.shared_bytes = static + dynamic_shared
        self.chunk_blocks = max(1, lanes_per_chunk // threads)

    def run(self) -> None:
        """Run every block; those that run together share ``%ctaid.y`` and ``.z``, on which loop lengths may depend."""
        row = self.grid[0]
        for first in range(0, math.prod(self.grid), row):
            for start in range(first, first + row, self.chunk_blocks):
                self._begin(np.arange(start, min(first + row, start + self.chunk_blocks)))
                self._run_chunk()

    def _begin(self, blocks: np.ndarray) -> None:
        lanes = self.lanes = len(blocks) * self.threads
        thread = np.tile(np.arange(self.threads), len(blocks))
        self.block = np.repeat(np.arange(len(blocks)), self.threads)
        self.warp = np.arange(lanes) // WARP
        nx, ny, nz = self.grid
        coordinates = (blocks % nx, blocks // nx % ny, blocks // (nx * ny))
        self.special = {"%tid.x": thread, "%laneid": thread % WARP, "%warpid": thread // WARP}
        self.special["%ntid.x"] = np.full(lanes, self.threads)
        for axis, coordinate, size in zip("xyz", coordinates, (nx, ny, nz)):
            self.special[f"%ctaid.{axis}"] = np.repeat(coordinate, self.threads)
            self.special[f"%nctaid.{axis}"] = np.full(lanes, size)
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.shared = SharedMemory(self.shared_bytes, self.block, self.warp, self.stats)
        self.registers: dict[str, np.ndarray] = {}
        # cp.async: copies of the open group, then the committed groups, oldest first.
        self.open_copies: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.copy_groups: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []
        # wgmma: registers that hold no result yet, with the number of the group that will write them.
        self.in_flight: dict[str, int] = {}
        self.open_group = 0
        self.pc = np.zeros(lanes, np.int64)
        self.done, self.parked = np.zeros(lanes, bool), np.zeros(lanes, bool)

    def _run_chunk(self) -> None:
        while True:
            ready = ~self.done & ~self.parked
            if ready.any():
                first = int(self.pc[ready].min())
                self._run_group(first, ready & (self.pc == first))
            elif self.done.all():
                return
            else:
                self._release_barrier()

    def _release_barrier(self) -> None:
        shape = (-1, self.threads)
        parked, done, pc = self.parked.reshape(shape), self.done.reshape(shape), self.pc.reshape(shape)
        waiting = parked.any(1)
        if ((parked & (pc != pc.max(1, keepdims=True))).any(1) & waiting).any() or (done.any(1) & waiting).any():
            raise PTXError("divergent bar.sync: threads of one block wait at different barriers or have left")
        self.shared.epoch[waiting] += 1
        self.stats["barriers"] += int(waiting.sum())
        self.parked[:] = False

    def _run_group(self, at: int, group: np.ndarray) -> None:
        """Run the lanes of ``group`` from instruction ``at`` until they may meet others."""
        code = self.kernel.code
        while at < len(code):
            instruction = code[at]
            active = group
            if instruction.guard is not None:
                active = group & (self.registers[instruction.guard] ^ instruction.negated)
            name = instruction.op[0]
            self.stats[f"instruction {name}"] += 1
            at += 1
            if name == "bra":
                self.pc[group] = at
                self.pc[active] = self.kernel.labels[instruction.args[0]]
                return
            if name in ("ret", "exit"):
                self.done |= active
                self.pc[group] = at
                return
            if name in ("bar", "barrier") and "warp" not in instruction.op:
                if len(instruction.args) > 1:
                    raise PTXError(f"unsupported partial barrier: {instruction.text}")
                self.parked |= group
                self.pc[group] = at
                return
            if active.any():
                self._execute(instruction, active)
            if at in self.kernel.branch_targets:
                self.pc[group] = at
                return
        self.done |= group

    def _execute(self, instruction: Instruction, active: np.ndarray) -> None:
        function = OPERATIONS.get(instruction.op[0])
        if function is None:
            raise PTXError(f"unsupported instruction: {instruction.text}")
        self.instruction, self.active, self.everywhere = instruction, active, bool(active.all())
        with np.errstate(all="ignore"):
            function(self, instruction)

    def get(self, operand: str, dtype: str) -> np.ndarray:
        """The operand's value in every lane, as ``dtype``'s numpy type (bf16 as its bits).

        Raises:
            PTXError: the operand is unknown, or a register that a wgmma not waited for will write.
        """
        if operand in self.in_flight:
            raise PTXError(f"{operand} is read before its wgmma is waited for: {self.instruction.text}")
        return self.get_unchecked(operand, dtype)

    def get_unchecked(self, operand: str, dtype: str) -> np.ndarray:
        """`get` that lets a wgmma's accumulator pass."""
        if dtype == "pred":
            return self._predicate(operand)
        size, numpy_type = SIZES[dtype], NUMPY[dtype]
        if operand in self.kernel.registers:
            value = self.registers.get(operand)
            value = self._blank(operand) if value is None else value
            return value.view(numpy_type) if value.itemsize == size else value.astype(UNSIGNED[size]).view(numpy_type)
        if operand in self.special:
            return self.special[operand].astype(UNSIGNED[size]).view(numpy_type)
        if operand[:2] in ("0f", "0F"):
            bits = np.full(self.lanes, int(operand[2:], 16), np.uint32)
            return bits.view(np.float32) if size == 4 and dtype[0] == "f" else bits.astype(UNSIGNED[size])
        if _LITERAL.fullmatch(operand):
            value = int(operand.rstrip("U"), 0) & ((1 << 8 * size) - 1)
            return np.full(self.lanes, value, UNSIGNED[size]).view(numpy_type)
        for table in (self.kernel.shared, self.parameter_offsets):
            if operand in table:
                return np.full(self.lanes, table[operand], numpy_type)
        raise PTXError(f"unsupported operand {operand}: {self.instruction.text}")

    def _predicate(self, operand: str) -> np.ndarray:
        negated = operand.startswith("!")
        operand = operand.lstrip("!")
        if operand not in self.kernel.registers:
            return np.full(self.lanes, bool(int(operand, 0)) ^ negated)
        value = self.registers.get(operand)
        return (self._blank(operand) if value is None else value) ^ negated

    def _blank(self, register: str) -> np.ndarray:
        """What a register holds before it is written: all ones, a NaN, so that a use of it shows."""
        dtype = self.kernel.registers[register]
        if dtype == "pred":
            return np.zeros(self.lanes, bool)
        unsigned = UNSIGNED[SIZES[dtype]]
        return np.full(self.lanes, np.iinfo(unsigned).max, unsigned)

    def put(self, register: str, value: np.ndarray) -> None:
        """Write the active lanes; a narrower value is extended by its sign, if it has one."""
        if register == "_":
            return
        dtype = self.kernel.registers[register]
        if dtype == "pred":
            value = value.astype(bool)
        else:
            unsigned = UNSIGNED[SIZES[dtype]]
            value = np.ascontiguousarray(value)
            same = value.itemsize == SIZES[dtype]
            value = value.view(unsigned) if same else value.astype(np.int64).astype(unsigned)
        if self.everywhere:
            self.registers[register] = value.copy()
            return
        old = self.registers.get(register)
        new = self._blank(register) if old is None else old.copy()
        new[self.active] = value[self.active]
        self.registers[register] = new

    def address(self, operand: str) -> np.ndarray:
        """The value of ``[register + offset]`` in every lane, int64."""
        match = _ADDRESS.match(operand)
        if match is None:
            raise PTXError(f"unsupported address {operand}: {self.instruction.text}")
        base, offset = match.groups()
        wide = self.kernel.registers.get(base) in ("b64", "u64", "s64")
        return self.get(base, "s64" if wide else "u32").astype(np.int64) + (int(offset, 0) if offset else 0)

    def require_whole_warps(self) -> None:
        """Raise where only part of a warp executes an instruction that needs all of it."""
        warps = self.active.reshape(-1, WARP)
        if (warps.any(1) & ~warps.all(1)).any():
            raise PTXError(f"warp-wide instruction executed by part of a warp: {self.instruction.text}")
