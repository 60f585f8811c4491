"""The machine, the versions and the date that every figure stands beside."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__, engines


def processor() -> str:
    """The CPU's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or "unknown"


def describe(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Hardware in plain types; no host name, nothing of who uses it."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "engine": engines.select(device, dtype),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found["tf32"] = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    return found


def versions() -> dict[str, str]:
    """Of what decides a figure, where it is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "resnet_fused": __version__}
    if torch.version.cuda or torch.version.hip:
        found["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
    if torch.cuda.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for package in ("triton", "apex", "inplace-abn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def without_paths(arguments: list[str]) -> str:
    """A command line whose paths are cut down to their last part."""
    return " ".join(_last_part(argument) for argument in arguments)


def _last_part(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return flag + equals + (Path(value).name if os.sep in value else value)
