"""The CUDA sources built as C++ against an emulated device, and run on CPU tensors.

A build has one kind of arithmetic and one variant: plain, with AddressSanitizer and UBSan, or with
ThreadSanitizer, which knows nothing but barriers and so finds what races in shared and global memory; each of
them also as the code for sm_75, which gives a block 64 KiB of shared memory. An edit changes the sources first: that
is how bugs are planted. Builds are kept under ``build/`` by their content.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCES, SHIM = ROOT / "csrc" / "cuda", Path(__file__).resolve().parent / "cuda"
CACHE = ROOT / "build" / "emulation"
MATHS = {"bf16": "MathBF16", "f16": "MathF16", "tf32": "MathTF32", "f32": "MathF32"}
VARIANTS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g1", "-fsanitize=thread"],
}
VARIANTS |= {f"{name}-sm_75": [*flags, "-D__CUDA_ARCH__=750"] for name, flags in VARIANTS.items()}
OPERATIONS = ("fwd", "dgrad", "wgrad")
_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"}
Edit = tuple[str, str, str]  # a file, a pattern, what every match becomes


class DeviceError(Exception):
    """The run ended in an error: what the sanitizer or the shim printed."""


def missing_tools() -> str:
    """The reason why nothing can be built here, or an empty string."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return "the emulated device switches its fibers in x86-64 assembly"
    return "" if shutil.which("g++") else "no g++"


def _edited(folder: Path, edits: Sequence[Edit]) -> Path:
    copy = folder / "csrc" / "cuda"
    shutil.copytree(SOURCES, copy)
    for name, pattern, replacement in edits:
        text, number = re.subn(pattern, replacement, (copy / name).read_text(encoding="utf-8"))
        if number == 0:
            raise ValueError(f"edit: {pattern!r} is not in {name}")
        (copy / name).write_text(text, encoding="utf-8")
    return copy


@functools.cache
def build(math: str, variant: str = "plain", edits: tuple[Edit, ...] = ()) -> Path:
    """The program for one kind of arithmetic.

    Raises:
        ValueError: an edit matches nothing.
        RuntimeError: the compiler fails; its output is the message.
    """
    digest = hashlib.sha256(repr((math, variant, edits, VARIANTS[variant])).encode())
    for path in sorted([*SOURCES.iterdir(), *SHIM.iterdir()]):
        digest.update(path.read_bytes())
    program = CACHE / f"{variant}-{math}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        sources = _edited(Path(scratch), edits)
        shim = Path(scratch) / "tests" / "emulation" / "cuda"
        shutil.copytree(SHIM, shim)
        made = Path(scratch) / "program"
        kind = [f"-DRESNET_FUSED_MATH={math}", f"-DRESNET_FUSED_MATH_TYPE=resnet_fused::cuda::{MATHS[math]}"]
        flags = ["-std=c++17", "-fno-strict-aliasing", "-w", f"-I{shim}", *kind, *VARIANTS[variant]]
        inputs = ["-x", "c++", str(sources / "projection.cu"), str(shim / "driver.cpp")]
        done = subprocess.run(["g++", *flags, *inputs, "-lpthread", "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        os.replace(made, program)
    return program


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def run(
    program: Path,
    operation: str,
    fields: Sequence[int],
    tensors: Sequence[Tensor | None],
    outputs: Sequence[int],
    beyond: Sequence[int] = (),
    seed: int = 0,
) -> None:
    """One launch of ``operation``; the tensors at the positions ``outputs`` are overwritten.

    Args:
        fields: N, C, H, W, K, P, Q, strides, block columns, element bytes, prologue, splits, relu, float weights.
        tensors: contiguous, in the order of the driver; None for a null pointer.
        beyond: how many bytes beyond an aligned address each tensor lies; 0 where it is not said.
        seed: 0 runs threads and blocks in order, another in random order.

    Raises:
        DeviceError: with what the program printed.
    """
    parts = [struct.pack("<17q", OPERATIONS.index(operation), seed, *fields), struct.pack("<q", len(tensors))]
    for i, tensor in enumerate(tensors):
        raw = b"" if tensor is None else _bytes(tensor)
        offset = beyond[i] if i < len(beyond) else 0
        parts.append(struct.pack("<3q", len(raw), offset, i not in outputs))
        parts.append(b"" if i in outputs else raw)
    with tempfile.TemporaryDirectory() as folder:
        case, result = Path(folder) / "case", Path(folder) / "result"
        case.write_bytes(b"".join(parts))
        done = subprocess.run(
            [program, case, result], capture_output=True, text=True, env={**os.environ, **_OPTIONS}, timeout=300
        )
        if done.returncode:
            raise DeviceError(done.stderr or f"exit status {done.returncode}")
        raw = result.read_bytes()
    start = 0
    for i in outputs:
        tensor = tensors[i]
        if tensor is not None and tensor.numel():
            size = tensor.numel() * tensor.element_size()
            flat = torch.frombuffer(bytearray(raw[start : start + size]), dtype=tensor.dtype)
            tensor.copy_(flat.view(tensor.shape))
            start += size


def plan(
    x_shape: Sequence[int],
    k: int,
    stride: tuple[int, int],
    element_bytes: int,
    reads_y: bool,
    multiprocessors: int,
    shared_bytes: int = 99 * 1024,
) -> tuple[int, int, int, int]:
    """What csrc/cuda/plan.h chooses: columns of fwd, dgrad and wgrad, and the splits of wgrad."""
    n, c, h, w = x_shape
    p, q = -(-h // stride[0]), -(-w // stride[1])
    values = (n, c, h, w, k, p, q, *stride, element_bytes, int(reads_y), multiprocessors, shared_bytes)
    command = [build("bf16"), "plan", *map(str, values)]
    fwd, dgrad, wgrad, splits = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    return fwd, dgrad, wgrad, splits
