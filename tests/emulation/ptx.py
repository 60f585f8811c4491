"""Execute compiled PTX of sm_80 and sm_90 on CPU tensors.

Raises `PTXError` at: an access outside every tensor, a misaligned one, a read of shared memory that was not written
or whose cp.async was not waited for, a race on shared memory between two barriers, a divergent barrier, an
accumulator read before its wgmma is waited for, and any instruction or modifier that is not modelled (TMA, mbarrier,
tcgen05, local memory). Sums of tensor-core instructions are exact and rounded once; a GPU's differ in the last bits.
Not modelled: memory order beyond barriers, the async proxy's fences, and races on global memory (see `interpreter`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from tests.emulation import ptx_arithmetic, ptx_tensor_core, ptx_transfer, ptx_warp
from tests.emulation.ptx_machine import OPERATIONS, Machine
from tests.emulation.ptx_memory import GlobalMemory, Stats
from tests.emulation.ptx_parse import Kernel, PTXError, parse

# Importing these registers their instructions.
_INSTRUCTION_MODULES = (ptx_arithmetic, ptx_tensor_core, ptx_transfer, ptx_warp)
TARGETS = (80, 90)

__all__ = ["OPERATIONS", "TARGETS", "PTXError", "launch"]


def _pack(kernel: Kernel, values: Sequence[int | float | bytes]) -> bytes:
    """The parameter block; parameters beyond ``values`` (Triton's scratch pointers) are zero."""
    last = kernel.parameters[-1]
    block = bytearray(last.offset + last.size)
    for parameter, value in zip(kernel.parameters, values):
        size = parameter.size
        if isinstance(value, bytes):
            if len(value) != size:
                raise ValueError(f"launch: {parameter.name}: expected {size} bytes, got {len(value)}")
            raw = value
        elif isinstance(value, float):
            raw = struct.pack("<f" if size == 4 else "<d", value)
        else:
            raw = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        block[parameter.offset : parameter.offset + size] = raw
    return bytes(block)


def launch(
    text: str,
    arguments: Sequence[torch.Tensor | int | float | bytes],
    grid: tuple[int, ...],
    threads: int,
    dynamic_shared: int = 0,
    name: str = "",
    pointed_at: Sequence[torch.Tensor] = (),
    lanes_per_chunk: int = 8192,
) -> Stats:
    """Run the kernel of a PTX module.

    Args:
        arguments: the kernel's parameters in order; CPU tensors stand for their pointers, bytes for a structure.
        threads: threads per block.  dynamic_shared: bytes.
        name: part of the kernel's name, where the module has several.
        pointed_at: tensors that a structure points at.
        lanes_per_chunk: how many threads run in lock-step; ``threads`` where blocks loop differently often.

    Returns:
        Counts: instructions by opcode, bytes (also each once) and 32-byte sectors of global memory read and written,
        cycles of shared memory and what they would be without bank conflicts, barriers.

    Raises:
        PTXError: see the module.
        ValueError: the module is for a target that is not modelled.
    """
    kernel = parse(text, name)
    if kernel.target not in TARGETS:
        raise ValueError(f"launch: expected PTX for sm_80 or sm_90, got sm_{kernel.target}")
    stats: Stats = Stats()
    tensors = {f"argument {i}": a for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
    tensors.update((f"tensor {i}", t) for i, t in enumerate(pointed_at))
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    whole_grid = (*grid, 1, 1, 1)[:3]
    memory = GlobalMemory(tensors, stats)
    Machine(kernel, whole_grid, threads, _pack(kernel, values), memory, dynamic_shared, stats, lanes_per_chunk).run()
    for kind in ("read", "written"):
        stats[f"global_unique_{kind}_bytes"] = memory.unique_bytes(kind)
    return stats
