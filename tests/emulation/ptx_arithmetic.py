"""Arithmetic, logic, comparison and conversion instructions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulation.ptx_machine import Machine, operation
from tests.emulation.ptx_parse import NUMPY, SIZES, UNSIGNED, Instruction, PTXError
from tests.emulation.rounding import bfloat16_values, round_to_bfloat16, round_to_tf32

Array = np.ndarray
_ROUNDERS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
# What each instruction may carry besides types; anything else is refused.
_MODIFIERS = {
    **dict.fromkeys(("add", "sub"), "rn ftz"),
    **dict.fromkeys(("neg", "abs"), "ftz"),
    **dict.fromkeys(("min", "max"), "NaN ftz"),
    "mul": "rn ftz lo hi wide",
    "mad": "lo hi wide",
    "fma": "rn ftz",
    "div": "rn full approx ftz",
    **dict.fromkeys(("ex2", "lg2", "rsqrt"), "approx ftz"),
    **dict.fromkeys(("rcp", "sqrt"), "rn approx ftz"),
    "setp": "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz",
    "cvt": "rn rz rna ftz sat rni rzi rmi rpi",
    "shf": "l r wrap clamp",
}


def _check_modifiers(ins: Instruction) -> str:
    """The instruction's type; raises PTXError at a modifier that is not modelled."""
    allowed = _MODIFIERS.get(ins.op[0], "").split()
    for part in ins.op[1:]:
        if part not in SIZES and part != "pred" and part not in allowed:
            raise PTXError(f"unsupported modifier .{part}: {ins.text}")
    return ins.op[-1]


def _values(m: Machine, operand: str, dtype: str) -> Array:
    value = m.get(operand, dtype)
    if dtype == "bf16":
        return bfloat16_values(value)
    return value.astype(np.float32) if dtype == "f16" else value


def _packed(value: Array, dtype: str) -> Array:
    """``value`` as a register holds it; a NaN is always the same one, as on a GPU and not as on a CPU."""
    if dtype == "bf16":
        return round_to_bfloat16(value)
    if value.dtype.kind == "f":
        value = np.where(np.isnan(value), value.dtype.type(np.nan), value)
    return value.astype(np.float16) if dtype == "f16" else value


def _halves(m: Machine, operand: str, dtype: str) -> list[Array]:
    """The two elements of a packed register, low first; floats as float32."""
    both = np.ascontiguousarray(m.get(operand, "b32")).view(np.uint16).reshape(-1, 2)
    parts = [np.ascontiguousarray(both[:, i]) for i in range(2)]
    if dtype in ("s16x2", "u16x2"):
        return [p.view(NUMPY[dtype[:-2]]) for p in parts]
    return [bfloat16_values(p) if dtype == "bf16x2" else p.view(np.float16).astype(np.float32) for p in parts]


def _join(low: Array, high: Array, dtype: str) -> Array:
    parts = [np.ascontiguousarray(_packed(p, dtype[:-2])).view(np.uint16).astype(np.uint32) for p in (low, high)]
    return parts[0] | parts[1] << np.uint32(16)


def _apply(m: Machine, ins: Instruction, function: Callable[..., Array]) -> None:
    dtype = _check_modifiers(ins)
    if dtype.endswith("x2"):
        operands = [_halves(m, a, dtype) for a in ins.args[1:]]
        m.put(ins.args[0], _join(*(function(*column) for column in zip(*operands)), dtype))
    elif dtype == "pred":
        m.put(ins.args[0], function(*(m.get(a, dtype) for a in ins.args[1:])))
    else:
        m.put(ins.args[0], _packed(function(*(_values(m, a, dtype) for a in ins.args[1:])), dtype))


def _fused_multiply_add(x: Array, y: Array, z: Array) -> Array:
    return (x.astype(np.float64) * y + z).astype(x.dtype)


_SIMPLE: dict[str, Callable[..., Array]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "neg": lambda x: -x,
    "abs": np.abs,
    "fma": _fused_multiply_add,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: x.dtype.type(1) / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: x.dtype.type(1) / np.sqrt(x),
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "not": lambda x: ~x,
}


@operation(*_SIMPLE)
def _simple(m: Machine, ins: Instruction) -> None:
    _apply(m, ins, _SIMPLE[ins.op[0]])


@operation("min", "max")
def _extremum(m: Machine, ins: Instruction) -> None:
    smaller = ins.op[0] == "min"
    keeps_nan = "NaN" in ins.op or ins.op[-1][0] not in "fb"
    _apply(m, ins, (np.minimum if smaller else np.maximum) if keeps_nan else (np.fmin if smaller else np.fmax))


@operation("mul", "mad")
def _multiply(m: Machine, ins: Instruction) -> None:
    dtype = _check_modifiers(ins)
    addend = ins.op[0] == "mad"
    size = SIZES[dtype]
    if "wide" in ins.op or "hi" in ins.op:
        if size == 8:
            raise PTXError(f"unsupported 128-bit product: {ins.text}")
        wide = np.int64 if dtype[0] == "s" else np.uint64
        product = m.get(ins.args[1], dtype).astype(wide) * m.get(ins.args[2], dtype).astype(wide)
        result_type = f"{dtype[0]}{16 * size}" if "wide" in ins.op else dtype
        product = (product if "wide" in ins.op else product >> wide(8 * size)).astype(NUMPY[result_type])
        m.put(ins.args[0], product + m.get(ins.args[3], result_type) if addend else product)
    else:
        _apply(m, ins, (lambda x, y, z: x * y + z) if addend else (lambda x, y: x * y))


@operation("div", "rem")
def _divide(m: Machine, ins: Instruction) -> None:
    dtype = _check_modifiers(ins)
    if dtype[0] == "f":
        _apply(m, ins, lambda x, y: x / y)
        return
    x, y = m.get(ins.args[1], dtype), m.get(ins.args[2], dtype)
    if ((y == 0) & m.active).any():
        raise PTXError(f"integer division by zero: {ins.text}")
    y = np.where(y == 0, y.dtype.type(1), y)
    remainder = np.fmod(x, y)
    m.put(ins.args[0], remainder if ins.op[0] == "rem" else (x - remainder) // y)


@operation("shl", "shr")
def _shift(m: Machine, ins: Instruction) -> None:
    dtype = _check_modifiers(ins)
    bits = 8 * SIZES[dtype]
    value, count = m.get(ins.args[1], dtype), m.get(ins.args[2], "u32")
    limited = np.minimum(count, bits - 1).astype(value.dtype)
    if ins.op[0] == "shr" and dtype[0] == "s":
        m.put(ins.args[0], value >> limited)
    else:
        shifted = value << limited if ins.op[0] == "shl" else value >> limited
        m.put(ins.args[0], np.where(count >= bits, value.dtype.type(0), shifted))


@operation("shf")
def _funnel_shift(m: Machine, ins: Instruction) -> None:
    _check_modifiers(ins)
    low, high = (m.get(a, "b32").astype(np.uint64) for a in ins.args[1:3])
    count = m.get(ins.args[3], "u32")
    count = (count & 31 if "wrap" in ins.op else np.minimum(count, 32)).astype(np.uint64)
    both = high << np.uint64(32) | low
    m.put(ins.args[0], ((both << count) >> np.uint64(32) if ins.op[1] == "l" else both >> count).astype(np.uint32))


@operation("bfe")
def _extract_bits(m: Machine, ins: Instruction) -> None:
    dtype = _check_modifiers(ins)
    value = m.get(ins.args[1], dtype).astype(np.int64)
    start, length = (m.get(a, "u32").astype(np.int64) for a in ins.args[2:4])
    if SIZES[dtype] != 4 or (start > 31).any() or (length > 32).any():
        raise PTXError(f"unsupported bit field: {ins.text}")
    field = (value >> start) & ((np.int64(1) << length) - 1)
    if dtype == "s32":
        sign = (length > 0) & (field >> np.maximum(length - 1, 0) & 1 == 1)
        field = np.where(sign, field - (np.int64(1) << length), field)
    m.put(ins.args[0], field.astype(np.int32))


@operation("prmt")
def _permute_bytes(m: Machine, ins: Instruction) -> None:
    low, high = (m.get(a, "b32").astype(np.uint64) for a in ins.args[1:3])
    both, control, out = low | high << np.uint64(32), m.get(ins.args[3], "b32"), np.zeros(m.lanes, np.uint32)
    for i in range(4):
        selector = (control >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> ((selector & 7).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(selector & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        out |= byte << np.uint32(8 * i)
    m.put(ins.args[0], out)


@operation("lop3")
def _three_input_logic(m: Machine, ins: Instruction) -> None:
    operands = [m.get(a, "b32") for a in ins.args[1:4]]
    table, out = int(ins.args[4], 0), np.zeros(m.lanes, np.uint32)
    for row in range(8):
        if table >> row & 1:
            x, y, z = (value if row >> (2 - i) & 1 else ~value for i, value in enumerate(operands))
            out |= x & y & z
    m.put(ins.args[0], out)


def _compare(how: str, x: Array, y: Array) -> Array:
    unordered = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.zeros(x.shape, bool)
    if how in ("num", "nan"):
        return unordered ^ (how == "num")
    base = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how[:2], how[:2])
    compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    compare.update(gt=np.greater, ge=np.greater_equal)
    result = compare[base](x, y)
    return result | unordered if len(how) == 3 else result & ~unordered


@operation("setp")
def _set_predicate(m: Machine, ins: Instruction) -> None:
    dtype = _check_modifiers(ins)
    first, *second = ins.args[0].split("|")
    if dtype in ("f16x2", "bf16x2"):
        for register, x, y in zip((first, *second), _halves(m, ins.args[1], dtype), _halves(m, ins.args[2], dtype)):
            m.put(register, _compare(ins.op[1], x, y))
        return
    result = _compare(ins.op[1], _values(m, ins.args[1], dtype), _values(m, ins.args[2], dtype))
    if len(ins.args) > 3:
        other = m.get(ins.args[3], "pred")
        result = {"and": result & other, "or": result | other, "xor": result ^ other}[ins.op[2]]
    m.put(first, result)
    for register in second:
        m.put(register, ~result)


@operation("selp")
def _select(m: Machine, ins: Instruction) -> None:
    chosen = m.get(ins.args[3], "pred")
    m.put(ins.args[0], np.where(chosen, *(m.get(a, _check_modifiers(ins)) for a in ins.args[1:3])))


def _to_integer(value: Array, dtype: str, rounding: str) -> Array:
    limits = np.iinfo(NUMPY[dtype])
    value = np.nan_to_num(_ROUNDERS[rounding](value.astype(np.float64)), posinf=np.inf, neginf=-np.inf)
    inside = np.where((value < limits.max) & (value > limits.min), value, 0).astype(NUMPY[dtype])
    return np.where(value >= limits.max, limits.max, np.where(value <= limits.min, limits.min, inside))


@operation("cvt")
def _convert(m: Machine, ins: Instruction) -> None:
    source = _check_modifiers(ins)
    target = ins.op[-2]
    if target in ("bf16x2", "f16x2"):
        high, low = (_values(m, a, source) for a in ins.args[1:3])
        m.put(ins.args[0], _join(low, high, target))
        return
    value = _values(m, ins.args[1], source)
    rounding = next((r for r in _ROUNDERS if r in ins.op), "")
    if "sat" in ins.op or (target in ("f16", "f32") and "rz" in ins.op):
        raise PTXError(f"unsupported modifier: {ins.text}")
    if target == "tf32":
        result = round_to_tf32(value)
    elif target == "bf16":
        result = round_to_bfloat16(value, toward_zero="rz" in ins.op)
    elif target[0] == "f":
        result = (_ROUNDERS[rounding](value) if rounding else value).astype(NUMPY[target])
    elif value.dtype.kind == "f":
        result = _to_integer(value, target, rounding).astype(NUMPY[target])
    else:
        result = value.astype(UNSIGNED[SIZES[target]]).view(NUMPY[target])
    m.put(ins.args[0], result)
