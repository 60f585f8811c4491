"""mma.sync (sm_80) and wgmma (sm_90), with exact products and float64 sums rounded once per instruction."""

from __future__ import annotations

import re

import numpy as np

from tests.emulation.ptx_machine import WARP, Machine, operation, vector
from tests.emulation.ptx_parse import Instruction, PTXError
from tests.emulation.rounding import bfloat16_values

_WARPGROUP = 4 * WARP
_ELEMENT_BYTES = {"bf16": 2, "f16": 2, "tf32": 4}
# Bytes per row of a swizzled tile, and the mask of the address bits that are mixed in, by descriptor mode.
_SWIZZLE = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}


def _shape(ins: Instruction) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """(m, n, k) of the instruction, and its types (accumulator, a, b, ...).

    Raises:
        PTXError: types other than float32 accumulation of bf16, f16 or tf32.
    """
    index = next(i for i, part in enumerate(ins.op) if re.fullmatch(r"m\d+n\d+k\d+", part))
    types = tuple(part for part in ins.op[index + 1 :] if part not in ("row", "col"))
    if types[0] != "f32" or types[1] not in _ELEMENT_BYTES or types[2] != types[1]:
        raise PTXError(f"unsupported types: {ins.text}")
    rows, columns, depth = map(int, re.findall(r"\d+", ins.op[index]))
    return (rows, columns, depth), types


def _elements(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes along the last axis as values, float64."""
    raw = np.ascontiguousarray(raw)
    if dtype == "bf16":
        return bfloat16_values(raw.view(np.uint16)).astype(np.float64)
    if dtype == "f16":
        return raw.view(np.float16).astype(np.float64)
    return (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def _fragment(m: Machine, registers: list[str], rows: int, depth: int, dtype: str, row_halves: int) -> np.ndarray:
    """(warps, rows, depth) from the registers of a warp; ``row_halves`` is 2 for operand a, 1 for b."""
    lane = np.arange(WARP)
    per = 4 // _ELEMENT_BYTES[dtype]
    out = np.zeros((m.lanes // WARP, rows, depth))
    for i, register in enumerate(registers):
        raw = np.ascontiguousarray(m.get(register, "b32")).reshape(-1, WARP, 1).view(np.uint8)
        values = _elements(raw, dtype)
        for j in range(per):
            column = lane % 4 * per + j + 4 * per * (i // row_halves)
            out[:, lane // 4 + 8 * (i % row_halves), column] = values[:, :, j]
    return out


@operation("mma")
def _matrix_multiply(m: Machine, ins: Instruction) -> None:
    m.require_whole_warps()
    if not m.everywhere:
        raise PTXError(f"unsupported under divergence: {ins.text}")
    (rows, columns, depth), types = _shape(ins)
    d, a, b, c = (vector(operand) for operand in ins.args[:4])
    left = _fragment(m, a, rows, depth, types[1], 2)
    right = _fragment(m, b, columns, depth, types[1], 1)
    product = np.matmul(left, right.transpose(0, 2, 1))
    lane = np.arange(WARP)
    results = []
    for i, addend in enumerate(c):
        part = product[:, lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]
        results.append((part + m.get(addend, "f32").reshape(-1, WARP)).astype(np.float32).reshape(-1))
    for register, result in zip(d, results):
        m.put(register, result)


def _descriptor_matrix(
    m: Machine, operand: str, rows: int, depth: int, dtype: str, transposed: bool, ins: Instruction
) -> np.ndarray:
    """(warpgroups, rows, depth) from shared memory, through a matrix descriptor."""
    size = _ELEMENT_BYTES[dtype]
    descriptor = m.get(operand, "b64").reshape(-1, _WARPGROUP)[:, 0]
    fields = (((descriptor >> np.uint64(s)) & np.uint64(0x3FFF)).astype(np.int64) << 4 for s in (0, 16, 32))
    modes = np.unique(descriptor >> np.uint64(62))
    if modes.size > 1:
        raise PTXError(f"unsupported mixture of swizzles: {ins.text}")
    width, mask = _SWIZZLE[int(modes[0])]
    row, column, byte = np.arange(rows)[:, None, None], np.arange(depth)[None, :, None], np.arange(size)
    start, leading, stride = (value[:, None, None, None] for value in fields)
    if transposed:
        offset = row * size + byte
        address = start + column % 8 * width + column // 8 * stride + offset % width + offset // width * leading
    else:
        offset = column * size + byte
        within, beyond = (offset, 0) if mask else (offset % 16, offset // 16)
        address = start + row % 8 * width + row // 8 * stride + within + beyond * leading
    address = address ^ (((address >> 7) & mask) << 4)
    raw = m.shared.gather(address, np.arange(0, m.lanes, _WARPGROUP), ins.text)
    return _elements(raw, dtype)[..., 0]


def _issue(m: Machine, ins: Instruction) -> None:
    (_, columns, depth), types = _shape(ins)
    d, rest = vector(ins.args[0]), ins.args[3:]
    flags = [int(value) for value in rest[1:]]
    if flags[:2] not in ([], [1, 1]):
        raise PTXError(f"unsupported negation: {ins.text}")
    transposed = flags[2:] if len(flags) > 2 else [0, 0]
    if ins.args[1].startswith("{"):
        left = _fragment(m, vector(ins.args[1]), 16, depth, types[1], 2).reshape(-1, 64, depth)
    else:
        left = _descriptor_matrix(m, ins.args[1], 64, depth, types[1], bool(transposed[0]), ins)
    right = _descriptor_matrix(m, ins.args[2], columns, depth, types[1], bool(transposed[-1]), ins)
    product = np.matmul(left, right.transpose(0, 2, 1))
    accumulates = m.get(rest[0], "pred").reshape(-1, _WARPGROUP)
    thread = np.arange(_WARPGROUP)
    for i, register in enumerate(d):
        row = 16 * (thread // WARP) + thread % WARP // 4 + 8 * (i % 4 // 2)
        column = 8 * (i // 4) + thread % 4 * 2 + i % 2
        old = np.where(accumulates, m.get_unchecked(register, "f32").reshape(-1, _WARPGROUP), 0)
        m.put(register, (product[:, row, column] + old).astype(np.float32).reshape(-1))
        m.in_flight[register] = m.open_group


@operation("wgmma")
def _warpgroup_multiply(m: Machine, ins: Instruction) -> None:
    """Computed at issue, but the result may not be read until its group is waited for."""
    if not m.everywhere or m.threads % _WARPGROUP:
        raise PTXError(f"unsupported outside whole warpgroups: {ins.text}")
    kind = ins.op[1]
    if kind == "mma_async":
        _issue(m, ins)
    elif kind == "commit_group":
        m.open_group += 1
    elif kind == "wait_group":
        finished = m.open_group - int(ins.args[0], 0)
        m.in_flight = {register: group for register, group in m.in_flight.items() if group >= finished}
    elif kind != "fence":
        raise PTXError(f"unsupported instruction: {ins.text}")
