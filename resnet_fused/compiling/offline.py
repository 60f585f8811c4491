"""Compile every Triton kernel that host code launches, for several GPU targets, without a GPU.

    with compile_offline(("sm_80", "sm_90")) as kernels:
        my_wrapper(cpu_tensors)
    assert all(k.spill_loads == 0 for k in kernels)

Nothing runs: a launch inside the block compiles and returns. Registers and stack are cuobjdump's, the instruction
mix is nvdisasm's, both shipped in the Triton wheel; for AMD both are read from the assembly.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .driver import FakeDriver, parse_target, replaced_launch

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
KIB = 1024
# The most dynamic shared memory one block may use, bytes: more compiles, and cannot launch.
SHARED_LIMIT = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
# One multiprocessor: resident warps, shared memory in KiB, resident blocks.
MULTIPROCESSOR = {
    "sm_80": (64, 164, 32),
    "sm_86": (48, 100, 16),
    "sm_89": (48, 100, 24),
    "sm_90": (64, 228, 32),
    "sm_100": (64, 228, 32),
    "sm_120": (48, 100, 24),
}
_SASS_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_GCN_OPCODE = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)", re.MULTILINE)
# A tile product in Triton's first intermediate language, its precision and the type of its first operand.
_DOT = re.compile(r"= tt\.dot [^\n]*?(?:inputPrecision = (\w+) )?: tensor<[\dx]*x(\w+)>")
# Launch arguments of Triton itself, no part of a kernel's configuration.
_LAUNCH_OPTIONS = ("debug", "instrumentation_mode")


def missing_tools() -> str:
    """The reason why kernels cannot be compiled here, or an empty string."""
    absent = [t for t in ("ptxas", "cuobjdump", "nvdisasm") if not os.access(os.path.join(TOOLS, t), os.X_OK)]
    return f"the Triton wheel lacks {', '.join(absent)}" if absent else ""


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """One kernel, one configuration, one target: what the compiler made of it. Sizes are in bytes.

    ``key`` is Triton's own hash of source, specialisation, options and target.
    """

    name: str
    target: str
    key: str
    config: dict[str, Any]
    num_warps: int
    num_stages: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    local_bytes: int
    spill_loads: int
    spill_stores: int
    opcodes: collections.Counter[str]
    assembly: dict[str, Any] = dataclasses.field(repr=False)

    def count(self, *families: str, width: str = "") -> int:
        """Instructions whose opcode is one of ``families``; ``width`` (such as "128") names a modifier it has."""
        split = ((opcode.split("."), number) for opcode, number in self.opcodes.items())
        return sum(n for parts, n in split if parts[0] in families and (not width or width in parts[1:]))

    @property
    def mma(self) -> int:
        """Warp-wide tensor-core instructions (mma.sync, or MFMA on AMD)."""
        return self.count("HMMA", "IMMA") + sum(n for o, n in self.opcodes.items() if o.startswith("v_mfma"))

    @property
    def wgmma(self) -> int:
        """Warpgroup-wide tensor-core instructions (sm_90)."""
        return self.count("HGMMA", "IGMMA")

    @property
    def tcgen05(self) -> int:
        """Tensor-core instructions of the fifth generation (sm_100)."""
        return self.count("UTCHMMA", "UTCIMMA")

    @property
    def tensor_core(self) -> str:
        """The kind of tensor-core instruction used: mma, wgmma, tcgen05, several joined by "+", or "none"."""
        return "+".join(name for name in ("mma", "wgmma", "tcgen05") if getattr(self, name)) or "none"

    @property
    def wants_tensor_core(self) -> bool:
        """Whether the source multiplies tiles in a precision that tensor cores have: not exact float32 (or wider)."""
        dots = _DOT.findall(self.assembly["ttir"])
        return any(element not in ("f32", "f64") or precision == "tf32" for precision, element in dots)

    @property
    def cp_async(self) -> int:
        """Asynchronous copies from global to shared memory."""
        return self.count("LDGSTS")

    @property
    def wide_copies(self) -> int:
        """Those of them that copy 128 bits."""
        return self.count("LDGSTS", width="128")

    @property
    def wide_loads(self) -> int:
        """Global loads of 128 bits, plain or asynchronous."""
        return self.count("LDG", "LDGSTS", width="128") + self.count("global_load_dwordx4", "buffer_load_dwordx4")

    @property
    def wide_stores(self) -> int:
        """Global stores of 128 bits."""
        return self.count("STG", width="128") + self.count("global_store_dwordx4", "buffer_store_dwordx4")

    @property
    def launches(self) -> bool:
        """Whether the shared memory fits the target's limit for one block."""
        return self.shared_bytes <= SHARED_LIMIT[self.target]

    def blocks_per_multiprocessor(self) -> int:
        """Resident blocks that registers, shared memory, warps and the block limit allow (NVIDIA).

        Raises:
            ValueError: the target is not an NVIDIA one.
        """
        if self.target not in MULTIPROCESSOR:
            raise ValueError(f"blocks_per_multiprocessor: expected one of {sorted(MULTIPROCESSOR)}, got {self.target}")
        warps, shared_kib, blocks = MULTIPROCESSOR[self.target]
        # Registers go to warps in units of 256, warps to four partitions of 16384 registers each; every
        # block takes shared memory in units of 1 KiB, plus 1 KiB for the system.
        per_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        by_registers = (16384 // per_warp) * 4 // self.num_warps
        shared = -(-self.shared_bytes // KIB) * KIB + KIB
        return min(blocks, warps // self.num_warps, by_registers, shared_kib * KIB // shared)

    def occupancy(self) -> float:
        """Resident warps over the most there can be, 0 to 1 (NVIDIA)."""
        return self.blocks_per_multiprocessor() * self.num_warps / MULTIPROCESSOR[self.target][0]


def _tool(name: str, *arguments: str) -> str:
    command = [os.path.join(TOOLS, name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# The networks launch one compiled kernel many times, and the tools take 0.1 s each.
@functools.lru_cache(maxsize=4096)
def _inspect_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        usage, sass = _tool("cuobjdump", "-res-usage", path), _tool("nvdisasm", "-c", path)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    opcodes = collections.Counter(_SASS_OPCODE.findall(sass))
    if match is None or not opcodes:
        raise RuntimeError(f"cuobjdump and nvdisasm: expected register counts and instructions, got {usage!r}")
    registers, stack, local = map(int, match.groups())

    def family(name: str) -> int:
        return sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] == name)

    return {
        "registers": registers,
        "stack_bytes": stack,
        "local_bytes": local,
        "spill_loads": family("LDL"),
        "spill_stores": family("STL"),
        "opcodes": opcodes,
    }


@functools.lru_cache(maxsize=4096)
def _inspect_amdgcn(text: str) -> dict[str, Any]:
    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        if match is None:
            raise RuntimeError(f"amdgcn assembly: expected .{name}, found none")
        return int(match.group(1))

    opcodes = collections.Counter(_GCN_OPCODE.findall(text))
    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "local_bytes": field("private_segment_fixed_size"),
        "spill_loads": field("vgpr_spill_count"),
        "spill_stores": field("vgpr_spill_count"),
        "opcodes": opcodes,
    }


def _config(function: JITFunction, options: dict[str, Any]) -> dict[str, Any]:
    """What of a launch's keyword arguments the kernel is compiled for: constants, and Triton's options."""
    runtime = {parameter.name for parameter in function.params if not parameter.is_constexpr}
    return {k: v for k, v in options.items() if k not in _LAUNCH_OPTIONS and k not in runtime}


def _describe(function: JITFunction, target: str, compiled: Any, options: dict[str, Any]) -> CompiledKernel:
    asm = compiled.asm
    found = _inspect_cubin(asm["cubin"]) if "cubin" in asm else _inspect_amdgcn(asm["amdgcn"])
    metadata = compiled.metadata
    return CompiledKernel(
        function.fn.__name__,
        target,
        compiled.hash,
        _config(function, options),
        metadata.num_warps,
        metadata.num_stages,
        metadata.shared,
        assembly=dict(asm),
        **found,
    )


@dataclasses.dataclass(frozen=True)
class Failure:
    """A launch that did not compile: kernel, target, configuration, and what the compiler said."""

    name: str
    target: str
    config: dict[str, Any]
    error: Exception


@contextlib.contextmanager
def compile_offline(
    targets: Sequence[str] = TARGETS,
    wanted: Callable[[str, dict[str, Any]], bool] = lambda name, config: True,
    failures: list[Failure] | None = None,
) -> Iterator[list[CompiledKernel]]:
    """Compile each launch in the block for every target, and every configuration of an autotuner; run none.

    Args:
        wanted: whether to compile a launch, by the kernel's name and its keyword arguments.
        failures: gains the launches that do not compile; None lets the compiler's exception out.

    Yields:
        A list that fills with one `CompiledKernel` per launch, configuration and target.

    Raises:
        Whatever the compiler raises, at the launch, without ``failures``.
    """
    parsed = [(name, parse_target(name)) for name in targets]
    kernels: list[CompiledKernel] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        compiled = None
        for name, target in parsed if wanted(self.fn.__name__, kwargs) else ():
            driver.set_active(FakeDriver(target))
            try:
                compiled = genuine(self, *args, grid=grid, warmup=True, **kwargs)
            except Exception as error:
                if failures is None:
                    raise
                failures.append(Failure(self.fn.__name__, name, _config(self, kwargs), error))
            else:
                kernels.append(_describe(self, name, compiled, kwargs))
        return compiled

    def autotune(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args))
        for config in self.prune_configs(kwargs):
            compiled = self.fn.run(*args, **kwargs, **config.all_kwargs())
        self.nargs = None
        return compiled

    with replaced_launch(run, autotune) as genuine:
        yield kernels
