"""Moves, loads, stores and cp.async."""

from __future__ import annotations

import numpy as np

from tests.emulation.ptx_machine import Machine, operation, vector
from tests.emulation.ptx_parse import NUMPY, SIZES, UNSIGNED, Instruction, PTXError

# Generic addresses of shared memory are its own offsets here, and never meet a generic load or store.
_SPACES = ("param", "global", "shared")


def _space(ins: Instruction) -> str:
    space = next((part.split("::")[0] for part in ins.op[1:] if part.split("::")[0] in _SPACES), "")
    if not space:
        raise PTXError(f"unsupported state space: {ins.text}")
    return space


@operation("mov")
def _move(m: Machine, ins: Instruction) -> None:
    target, source = ins.args
    dtype = ins.op[-1]
    if target.startswith("{"):
        parts, size = vector(target), SIZES[dtype]
        value, width = m.get(source, dtype).view(UNSIGNED[size]), size // len(parts)
        for i, register in enumerate(parts):
            m.put(register, (value >> UNSIGNED[size](8 * width * i)).astype(UNSIGNED[width]))
    elif source.startswith("{"):
        parts, unsigned = vector(source), UNSIGNED[SIZES[dtype]]
        width, value = SIZES[dtype] // len(parts), np.zeros(m.lanes, unsigned)
        for i, register in enumerate(parts):
            value |= m.get(register, f"b{8 * width}").astype(unsigned) << unsigned(8 * width * i)
        m.put(target, value)
    else:
        # The compiler copies accumulators that are in flight: the copy is then in flight as well.
        m.put(target, m.get_unchecked(source, dtype))
        if source in m.in_flight:
            m.in_flight[target] = m.in_flight[source]
        else:
            m.in_flight.pop(target, None)


@operation("cvta")
def _convert_address(m: Machine, ins: Instruction) -> None:
    if "global" not in ins.op and "shared" not in ins.op:
        raise PTXError(f"unsupported state space: {ins.text}")
    m.put(ins.args[0], m.get(ins.args[1], ins.op[-1]))


@operation("ld")
def _load(m: Machine, ins: Instruction) -> None:
    dtype, registers, space = ins.op[-1], vector(ins.args[0]), _space(ins)
    width, address = SIZES[dtype] * len(registers), m.address(ins.args[1])
    raw = np.zeros((m.lanes, width), np.uint8)
    lanes = np.flatnonzero(m.active)
    if space == "param":
        raw[lanes] = m.parameters[address[lanes][:, None] + np.arange(width)]
    elif space == "global":
        raw[lanes] = m.memory.load(address[lanes], width, m.warp[lanes], ins.text)
    else:
        raw[lanes] = m.shared.load(address[lanes], width, lanes, ins.text)
    values = raw.view(NUMPY[dtype])
    for i, register in enumerate(registers):
        m.put(register, np.ascontiguousarray(values[:, i]))


@operation("st")
def _store(m: Machine, ins: Instruction) -> None:
    dtype, space = ins.op[-1], _space(ins)
    lanes = np.flatnonzero(m.active)
    values = np.stack([m.get(register, dtype)[lanes] for register in vector(ins.args[1])], axis=1)
    raw, address = np.ascontiguousarray(values).view(np.uint8), m.address(ins.args[0])[lanes]
    if space == "global":
        m.memory.store(address, raw, m.warp[lanes], ins.text)
    else:
        m.shared.store(address, raw, lanes, ins.text)


def _begin_copy(m: Machine, ins: Instruction) -> None:
    """Read global memory now; the bytes land in shared memory when the group is waited for."""
    width, lanes = int(ins.args[2], 0), np.flatnonzero(m.active)
    target, source = m.address(ins.args[0])[lanes], m.address(ins.args[1])[lanes]
    wanted = np.full(lanes.size, width, np.int64)
    if len(ins.args) > 3:
        wanted = m.get(ins.args[3], "u32")[lanes].astype(np.int64)
    if not np.isin(wanted, (0, width)).all():
        raise PTXError(f"unsupported partial copy: {ins.text}")
    raw, reads = np.zeros((lanes.size, width), np.uint8), wanted > 0
    if reads.any():
        raw[reads] = m.memory.load(source[reads], width, m.warp[lanes][reads], ins.text)
    at = m.shared.locate(target, width, lanes, True, ins.text)
    m.shared.initialised[at[:, None] + np.arange(width)] = False
    m.open_copies.append((at, raw, lanes))


@operation("cp")
def _copy_async(m: Machine, ins: Instruction) -> None:
    kind = ins.op[2] if ins.op[1] == "async" and len(ins.op) > 2 else ""
    if kind in ("commit_group", "wait_group", "wait_all") and not m.everywhere:
        raise PTXError(f"unsupported under divergence: {ins.text}")
    if kind in ("ca", "cg"):
        _begin_copy(m, ins)
    elif kind == "commit_group":
        m.copy_groups.append(m.open_copies)
        m.open_copies = []
    elif kind in ("wait_group", "wait_all"):
        keep = int(ins.args[0], 0) if kind == "wait_group" else 0
        while len(m.copy_groups) > keep:
            for at, raw, lanes in m.copy_groups.pop(0):
                m.shared.arrive(at, raw, lanes)
        if kind == "wait_all":
            for at, raw, lanes in m.open_copies:
                m.shared.arrive(at, raw, lanes)
            m.open_copies = []
    else:
        raise PTXError(f"unsupported instruction: {ins.text}")
