"""Engines: the primitives of `resnet_fused.reference`, each set for a kind of device.

An engine is a module with the functions of `resnet_fused.reference`, same names and arguments.
``reference`` is plain PyTorch and runs anywhere; ``cpu`` is the C++ extension.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from .. import reference
from . import cpu

_ENGINES: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}
_CPU_REASON = cpu.load()  # a constant: `select` is traced by torch.compile
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class EngineStatus(NamedTuple):
    """One line of `describe`."""

    name: str
    available: bool
    detail: str


def check_name(name: str | None) -> None:
    """Raise ValueError unless ``name`` is None or an engine that can run here."""
    if name is not None and name not in _ENGINES:
        raise ValueError(f"engine: expected one of {sorted(_ENGINES)} or None, got {name!r}")
    if name == "cpu" and _CPU_REASON is not None:
        raise ValueError(f"engine: 'cpu' cannot run: {_CPU_REASON}")


def select(device: torch.device, dtype: torch.dtype, requested: str | None = None) -> str:
    """The engine for activations of this device and dtype; ``requested`` wins where it can run."""
    cpu_runs = device.type == "cpu" and dtype in _CPU_DTYPES and _CPU_REASON is None
    if requested is not None and (requested != "cpu" or cpu_runs):
        return requested
    return "cpu" if cpu_runs else "reference"


def get(name: str) -> ModuleType:
    """The engine's module of primitives."""
    return _ENGINES[name]


def describe() -> list[EngineStatus]:
    """What `resnet-fused doctor` prints: every engine, whether it runs here, and why not."""
    detail = _CPU_REASON if _CPU_REASON is not None else f"C++ extension, {cpu.isa()} kernels"
    return [
        EngineStatus("cpu", _CPU_REASON is None, detail),
        EngineStatus("reference", True, "plain PyTorch, any device"),
    ]
