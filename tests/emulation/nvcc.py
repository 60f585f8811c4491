"""The CUDA sources compiled by nvcc: registers, spills and instructions of every kernel, and their PTX.

Needs no GPU: nvcc, and cuobjdump and nvdisasm of the toolkit or of the Triton wheel. Builds are kept under
``build/`` by their content. The table of all targets: ``python -m tests.emulation.nvcc``.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.emulation import device

sys.path.insert(0, str(device.ROOT / "csrc"))
import cuda_build  # the module that setup.py finds a toolkit with; it is no part of the package

KIB = 1024
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# Dynamic shared memory of one block at most, and of a multiprocessor, bytes; resident warps.
LIMITS = {
    "sm_75": (64 * KIB, 64 * KIB, 32),
    "sm_80": (163 * KIB, 164 * KIB, 64),
    "sm_86": (99 * KIB, 100 * KIB, 48),
    "sm_89": (99 * KIB, 100 * KIB, 48),
    "sm_90": (227 * KIB, 228 * KIB, 64),
    "sm_100": (227 * KIB, 228 * KIB, 64),
    "sm_120": (99 * KIB, 100 * KIB, 48),
}
WARPS = 8
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_MANGLED = re.compile(r"projection_(fwd|dgrad|wgrad)_kernelINS0_\d+Math\w+?ELi(\d+)E")


@functools.cache
def _toolkit() -> object:
    return cuda_build.find_toolkit(torch.version.cuda or "13.0", Path(torch.__file__).parent)


def missing_nvcc() -> str:
    """The reason why nothing can be compiled here, or an empty string."""
    found = _toolkit()
    return found if isinstance(found, str) else ""


def _tool(name: str) -> str | None:
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(name, path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def missing_tools() -> str:
    """`missing_nvcc`, or the reason why compiled code cannot be looked at."""
    absent = [name for name in ("cuobjdump", "nvdisasm") if _tool(name) is None]
    return missing_nvcc() or (f"no {' and no '.join(absent)}" if absent else "")


@functools.cache
def compile_to(math: str, target: str, kind: str) -> Path:
    """The kernels of one kind of arithmetic as ``cubin`` or ``ptx``; one run of nvcc makes both.

    Raises:
        RuntimeError: nvcc fails; its output is the message.
    """
    digest = hashlib.sha256(repr((math, target, _toolkit())).encode())
    for path in sorted(device.SOURCES.iterdir()):
        digest.update(path.read_bytes())
    made = device.CACHE / f"{math}-{target}-{digest.hexdigest()[:16]}.{kind}"
    if not made.exists():
        device.CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=device.CACHE) as scratch:
            flags = ["-std=c++17", "-O3", f"-arch={target}", "-cubin", "--keep", f"--keep-dir={scratch}"]
            source, cubin = str(device.SOURCES / cuda_build.KERNELS), f"{scratch}/projection.cubin"
            command = [str(_toolkit().nvcc), *flags, *cuda_build.math_flags(math), source, "-o", cubin]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stdout + done.stderr)
            for suffix in (".ptx", ".cubin"):
                os.replace(f"{scratch}/projection{suffix}", made.with_suffix(suffix))
    return made


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What nvcc made of one kernel for one target. Sizes are in bytes."""

    operation: str
    math: str
    columns: int
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: collections.Counter[str]

    def count(self, family: str, modifier: str = "") -> int:
        """Instructions of an opcode family, such as HMMA, that have the modifier, such as 128."""
        split = ((opcode.split("."), number) for opcode, number in self.opcodes.items())
        return sum(n for parts, n in split if parts[0] == family and (not modifier or modifier in parts[1:]))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count("LDL") + self.count("STL")

    def blocks_per_multiprocessor(self) -> int:
        """Resident blocks that registers, shared memory and warps allow."""
        _, shared, warps = LIMITS[self.target]
        # Registers go to a warp in units of 256, to four partitions of 16384; a block takes a KiB for the system.
        by_registers = 16384 // (-(-self.registers * 32 // 256) * 256) * 4 // WARPS
        return min(by_registers, shared // (-(-self.shared_bytes // KIB) * KIB + KIB), warps // WARPS)


@functools.cache
def shared_bytes(math: str, target: str) -> dict[tuple[str, int], int]:
    """Dynamic shared memory by operation and columns, as the launchers ask for it."""
    program = device.build(math, "plain-sm_75" if target == "sm_75" else "plain")
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    rows = (map(int, line.split()) for line in printed.splitlines())
    return {(device.OPERATIONS[operation], columns): size for operation, columns, size in rows}


@functools.cache
def kernels(math: str, target: str) -> tuple[CompiledKernel, ...]:
    """The six kernels of one kind of arithmetic, compiled for ``target``."""
    cubin = compile_to(math, target, "cubin")
    read = {"capture_output": True, "text": True, "check": True}
    usage = subprocess.run([_tool("cuobjdump"), "-res-usage", cubin], **read).stdout
    sass = subprocess.run([_tool("nvdisasm"), "-c", cubin], **read).stdout
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.MULTILINE | re.DOTALL))
    found = []
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        match = _MANGLED.search(name)
        if match is None:
            continue
        operation, columns = match[1], int(match[2])
        opcodes = collections.Counter(_OPCODE.findall(bodies[name]))
        shared = shared_bytes(math, target)[operation, columns]
        found.append(CompiledKernel(operation, math, columns, target, int(registers), int(stack), shared, opcodes))
    return tuple(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--maths", nargs="+", default=list(device.MATHS), choices=list(device.MATHS))
    arguments = parser.parse_args()
    reason = missing_tools() or device.missing_tools()
    if reason:
        raise SystemExit(f"nvcc: {reason}")
    print(f"{'kernel':22}{'target':8}{'regs':>5}{'spills':>7}{'shared':>8}{'blocks':>7}  HMMA  FFMA  LDGSTS.128  LDSM")
    for target in arguments.targets:
        for math in arguments.maths:
            for k in sorted(kernels(math, target), key=lambda k: (k.operation, k.columns)):
                name = f"{k.operation} {k.math} 128x{k.columns}"
                print(
                    f"{name:22}{target:8}{k.registers:5}{k.spills:7}{k.shared_bytes:8}{k.blocks_per_multiprocessor():7}"
                    f"{k.count('HMMA'):6}{k.count('FFMA'):6}{k.count('LDGSTS', '128'):12}{k.count('LDSM'):6}"
                )


if __name__ == "__main__":
    main()
