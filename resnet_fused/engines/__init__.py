"""Engines: the primitives of `resnet_fused.reference`, each set for a kind of device.

An engine is a module with the functions of `resnet_fused.reference`, same names and arguments; it may also run whole
sites (`resnet_fused.site`). ``reference`` is plain PyTorch and runs anywhere; ``cpu`` is the C++ extension; ``triton``
is for GPUs, and is imported when it is first chosen.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from .. import reference
from ..kernels.launch import is_counting
from . import cpu

_ENGINES: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}
_NAMES = (*_ENGINES, "triton")
_CPU_REASON = cpu.load()  # a constant: `select` is traced by torch.compile
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_TRITON = (3, 6)
_emulated = False


def _triton_reason() -> str | None:
    """Why the Triton engine cannot run in this installation, or None; imports nothing and asks no device."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built without GPU support"
    return None


_TRITON_REASON = _triton_reason()


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Let the Triton engine take tensors of any device in the block, whose launches are compiled or emulated."""
    global _emulated
    previous, _emulated = _emulated, True
    try:
        yield
    finally:
        _emulated = previous


class EngineStatus(NamedTuple):
    """One line of `describe`."""

    name: str
    available: bool
    detail: str


def check_name(name: str | None) -> None:
    """Raise ValueError unless ``name`` is None or an engine that can run here."""
    if name is not None and name not in _NAMES:
        raise ValueError(f"engine: expected one of {sorted(_NAMES)} or None, got {name!r}")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError(f"engine: 'triton' cannot run: {_TRITON_REASON}")
    if name == "cpu" and _CPU_REASON is not None:
        raise ValueError(f"engine: 'cpu' cannot run: {_CPU_REASON}")


def select(device: torch.device, dtype: torch.dtype, requested: str | None = None) -> str:
    """The engine for activations of this device and dtype; ``requested`` wins where it can run.

    Where launches are only counted, on the meta device, any engine can be asked for.
    """
    counted = is_counting() and requested == "cpu"
    runs = {
        "cpu": (device.type == "cpu" or counted) and dtype in _CPU_DTYPES and _CPU_REASON is None,
        "triton": dtype in _TRITON_DTYPES
        and (_emulated or is_counting() or (device.type == "cuda" and _TRITON_REASON is None)),
        "reference": True,
    }
    if requested is not None and runs[requested]:
        return requested
    if runs["triton"] and device.type == "cuda":
        return "triton"
    return "cpu" if runs["cpu"] else "reference"


def get(name: str) -> ModuleType:
    """The engine's module of primitives."""
    if name == "triton":
        from . import triton

        return triton
    return _ENGINES[name]


def describe() -> list[EngineStatus]:
    """What `resnet-fused doctor` prints: every engine, whether it runs here, and why not."""
    detail = _CPU_REASON if _CPU_REASON is not None else f"C++ extension, {cpu.isa()} kernels"
    triton = _TRITON_REASON or ("ready for GPU tensors" if torch.cuda.is_available() else "no GPU here")
    return [
        EngineStatus("triton", triton.startswith("ready"), triton),
        EngineStatus("cpu", _CPU_REASON is None, detail),
        EngineStatus("reference", True, "plain PyTorch, any device"),
    ]
