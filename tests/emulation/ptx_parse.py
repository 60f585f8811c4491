"""Read PTX text: kernels, registers, labels, shared variables and instructions."""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np

# Bytes of a register or memory operand of each type.
SIZES = {
    **dict.fromkeys(("u8", "s8", "b8"), 1),
    **dict.fromkeys(("u16", "s16", "b16", "f16", "bf16"), 2),
    **dict.fromkeys(("u32", "s32", "b32", "f32", "tf32", "f16x2", "bf16x2", "s16x2", "u16x2"), 4),
    **dict.fromkeys(("u64", "s64", "b64", "f64"), 8),
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SPECIAL = {"f16": np.float16, "f32": np.float32, "tf32": np.float32, "f64": np.float64}
NUMPY = {
    **{name: UNSIGNED[size] for name, size in SIZES.items()},
    **{name: np.dtype(f"i{SIZES[name]}").type for name in ("s8", "s16", "s32", "s64")},
    **_SPECIAL,
}


class PTXError(Exception):
    """The PTX did something wrong, or something that the emulator does not know."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``@guard op args``; ``op`` is split at its dots."""

    guard: str | None
    negated: bool
    op: tuple[str, ...]
    args: tuple[str, ...]
    text: str


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A kernel parameter: offset and size in bytes."""

    name: str
    dtype: str
    offset: int
    size: int


@dataclasses.dataclass
class Kernel:
    """One ``.entry``; sizes in bytes."""

    name: str
    target: int
    parameters: list[Parameter]
    registers: dict[str, str] = dataclasses.field(default_factory=dict)
    code: list[Instruction] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    shared: dict[str, int] = dataclasses.field(default_factory=dict)
    static_shared: int = 0
    branch_targets: frozenset[int] = frozenset()


def align(value: int, unit: int) -> int:
    """``value`` rounded up to a multiple of ``unit``."""
    return -(-value // unit) * unit


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside braces and brackets."""
    out, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += char
    return tuple(out + [current.strip()]) if current.strip() else tuple(out)


def _parse_parameters(text: str) -> list[Parameter]:
    out, offset = [], 0
    for declaration in filter(None, (p.strip() for p in text.split(","))):
        match = re.search(
            r"(?:\.align\s+(\d+)\s+)?\.(b8|u8|b16|u16|b32|u32|s32|f32|b64|u64|s64|f64)\b.*?([\w$]+)(?:\[(\d+)\])?$",
            declaration,
        )
        if match is None:
            raise PTXError(f"unsupported parameter: {declaration}")
        unit, dtype, name, length = match.groups()
        size = SIZES[dtype] * int(length or 1)
        # A structure passed by value is an array of bytes with an alignment of its own.
        offset = align(offset, int(unit) if length and unit else SIZES[dtype])
        out.append(Parameter(name, dtype, offset, size))
        offset += size
    return out


def _declare(kernel: Kernel, statement: str) -> None:
    """A ``.reg`` or ``.shared`` line; ``.loc`` and the like are ignored."""
    if statement.startswith(".local"):
        raise PTXError(f"unsupported local memory: {statement}")
    if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL):
        for register in match.group(2).split(","):
            if ranged := re.match(r"(.*)<(\d+)>", register.strip()):
                for i in range(int(ranged.group(2)) + 1):
                    kernel.registers[f"{ranged.group(1)}{i}"] = match.group(1)
            else:
                kernel.registers[register.strip()] = match.group(1)
    elif match := re.match(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", statement):
        kernel.static_shared = align(kernel.static_shared, int(match.group(1)))
        kernel.shared[match.group(2)] = kernel.static_shared
        kernel.static_shared += int(match.group(3))


def _parse_body(kernel: Kernel, body: str) -> None:
    body = re.sub(r"\.loc\s[^\n]*|\.section[^\n]*|\.pragma[^;]*;|\.file[^\n]*", "", body)
    statement = ""
    for token in re.split(r"(;|(?<![%\w])[\w$]+:(?!:))", body):
        if re.fullmatch(r"[\w$]+:", token):
            kernel.labels[token[:-1]] = len(kernel.code)
            statement = ""
            continue
        if token != ";":
            statement = token
            continue
        # Inline assembly is wrapped in braces of its own.
        statement = re.sub(r"^(?:[{}]\s*)+(?=[.@a-z]|$)", "", statement.strip()).strip()
        if statement.startswith("."):
            _declare(kernel, statement)
        elif statement:
            match = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
            if match is None:
                raise PTXError(f"not an instruction: {statement}")
            negated, guard, op, operands = match.groups()
            parts, text = tuple(op.split(".")), " ".join(statement.split())
            kernel.code.append(Instruction(guard, bool(negated), parts, split_operands(operands), text))
        statement = ""
    kernel.branch_targets = frozenset(kernel.labels.values())


@functools.lru_cache(maxsize=64)
def parse(text: str, name: str = "") -> Kernel:
    """The first kernel of a PTX module whose (mangled) name contains ``name``.

    Raises:
        PTXError: there is none, or something that the emulator does not know: initialised globals, local memory.
    """
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))
    target = re.search(r"\.target\s+sm_(\d+)", text)
    entries = re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)", text)
    entry = next((match for match in entries if name in match.group(1)), None)
    if target is None or entry is None:
        raise PTXError(f"parse: expected a .target and an .entry {name}".rstrip())
    if match := re.search(r"^\s*(?:\.visible\s+|\.weak\s+)*\.(?:global|const)\s.*", text, re.MULTILINE):
        raise PTXError(f"unsupported module variable: {match.group(0).strip()}")
    start = text.index("{", entry.end())
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            break
    kernel = Kernel(entry.group(1), int(target.group(1)), _parse_parameters(entry.group(2)))
    _parse_body(kernel, text[start + 1 : end])
    for name in re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", text):
        kernel.shared[name] = align(kernel.static_shared, 128)
    return kernel
