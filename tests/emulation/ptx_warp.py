"""Warp-wide instructions (shuffles, votes, ldmatrix, stmatrix), atomics, and those with nothing to do here."""

from __future__ import annotations

import numpy as np

from tests.emulation.ptx_machine import WARP, Machine, operation, vector
from tests.emulation.ptx_parse import NUMPY, SIZES, Instruction, PTXError

_LANE = np.arange(WARP)
_ATOMICS = {"add": np.add, "min": np.minimum, "max": np.maximum}


@operation("bar", "fence", "membar", "prefetch")
def _nothing(m: Machine, ins: Instruction) -> None:
    """bar.warp.sync and fences: lanes run in lock-step, and memory is sequentially consistent here."""


@operation("shfl")
def _shuffle(m: Machine, ins: Instruction) -> None:
    m.require_whole_warps()
    mode = next(part for part in ins.op if part in ("up", "down", "bfly", "idx"))
    value = m.get(ins.args[1], "b32")
    offset, control = (m.get(a, "u32").astype(np.int64) for a in ins.args[2:4])
    lane, offset = m.special["%laneid"].astype(np.int64), offset & 31
    segment, clamp = (control >> 8) & 31, control & 31
    limit = (lane & segment) | (clamp & ~segment)
    sources = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset}
    sources["idx"] = (lane & segment) | (offset & ~segment)
    source = sources[mode]
    valid = source >= limit if mode == "up" else source <= limit
    source = np.where(valid, source, lane)
    first, *second = ins.args[0].split("|")
    m.put(first, np.take_along_axis(value.reshape(-1, WARP), source.reshape(-1, WARP), 1).reshape(-1))
    for register in second:
        m.put(register, valid)


@operation("vote")
def _vote(m: Machine, ins: Instruction) -> None:
    m.require_whole_warps()
    votes = m.get(ins.args[1], "pred").reshape(-1, WARP)
    mode = next((part for part in ins.op if part in ("all", "any", "ballot")), "")
    if mode == "ballot":
        result = (votes.astype(np.uint64) << _LANE.astype(np.uint64)).sum(1).astype(np.uint32)
    elif mode:
        result = votes.all(1) if mode == "all" else votes.any(1)
    else:
        raise PTXError(f"unsupported vote: {ins.text}")
    m.put(ins.args[0], np.repeat(result, WARP))


@operation("atom", "red")
def _atomic(m: Machine, ins: Instruction) -> None:
    """A global update of one float32, or 32- or 64-bit integer, per lane, in lane order."""
    dtype, returns = ins.op[-1], ins.op[0] == "atom"
    name = next((part for part in ins.op if part in _ATOMICS), "")
    if not name or "global" not in ins.op or any(part in ("v2", "v4", "f16x2", "bf16x2") for part in ins.op):
        raise PTXError(f"unsupported atomic: {ins.text}")
    address, value = m.address(ins.args[returns]), m.get(ins.args[1 + returns], dtype)
    old = np.zeros(m.lanes, NUMPY[dtype])
    for lane in np.flatnonzero(m.active):
        at, warp = address[lane : lane + 1], m.warp[lane : lane + 1]
        old[lane] = m.memory.load(at, SIZES[dtype], warp, ins.text).view(NUMPY[dtype])[0, 0]
        new = np.array([[_ATOMICS[name](old[lane], value[lane])]], NUMPY[dtype])
        m.memory.store(at, new.view(np.uint8), warp, ins.text)
    if returns:
        m.put(ins.args[0], old)


def _matrix_rows(m: Machine, operand: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Lanes that give the address of a row of 16 bytes, and the addresses."""
    lanes = np.flatnonzero(m.special["%laneid"] < 8 * count)
    return lanes, m.address(operand)[lanes]


@operation("ldmatrix")
def _load_matrix(m: Machine, ins: Instruction) -> None:
    m.require_whole_warps()
    _require_whole_chunk(m, ins)
    registers = vector(ins.args[0])
    lanes, address = _matrix_rows(m, ins.args[1], len(registers))
    rows = np.zeros((m.lanes, 16), np.uint8)
    rows[lanes] = m.shared.load(address, 16, lanes, ins.text)
    elements = rows.view(np.uint16).reshape(-1, WARP, 8)
    for i, register in enumerate(registers):
        matrix = elements[:, 8 * i : 8 * i + 8]
        matrix = matrix.transpose(0, 2, 1) if "trans" in ins.op else matrix
        pairs = np.stack([matrix[:, _LANE // 4, _LANE % 4 * 2 + j] for j in range(2)], axis=2)
        m.put(register, np.ascontiguousarray(pairs).view(np.uint32).reshape(-1))


@operation("stmatrix")
def _store_matrix(m: Machine, ins: Instruction) -> None:
    m.require_whole_warps()
    _require_whole_chunk(m, ins)
    registers = vector(ins.args[1])
    rows = np.zeros((m.lanes // WARP, WARP, 8), np.uint16)
    for i, register in enumerate(registers):
        pairs = np.ascontiguousarray(m.get(register, "b32")).view(np.uint16).reshape(-1, WARP, 2)
        for j in range(2):
            row, column = _LANE // 4, _LANE % 4 * 2 + j
            row, column = (column, row) if "trans" in ins.op else (row, column)
            rows[:, 8 * i + row, column] = pairs[:, :, j]
    lanes, address = _matrix_rows(m, ins.args[0], len(registers))
    m.shared.store(address, rows.view(np.uint8).reshape(m.lanes, 16)[lanes], lanes, ins.text)


def _require_whole_chunk(m: Machine, ins: Instruction) -> None:
    if not m.everywhere:
        raise PTXError(f"unsupported under divergence: {ins.text}")
