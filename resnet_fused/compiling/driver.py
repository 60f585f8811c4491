"""Triton without a device: a driver that answers for a target, and launches that are redirected for a while."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


def parse_target(name: str) -> GPUTarget:
    """``sm_90`` or ``gfx942`` as Triton's target.

    Raises:
        ValueError: any other name.
    """
    if match := re.fullmatch(r"sm_(\d+)", name):
        return GPUTarget("cuda", int(match.group(1)), 32)
    if re.fullmatch(r"gfx9\w+", name):
        return GPUTarget("hip", name, 64)
    raise ValueError(f"target: expected sm_<number> or gfx9<name>, got {name!r}")


class FakeDriver(DriverBase):
    """What Triton asks of a driver in order to compile for ``target`` with no device present."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        """Always: it is set active by hand."""
        return True

    def get_current_target(self) -> GPUTarget:
        """The target to compile for."""
        return self.target

    def get_current_device(self) -> tuple[str, str, Any]:
        """A key for JITFunction.device_caches, one per target, which keeps the targets apart."""
        return ("offline", self.target.backend, self.target.arch)

    def set_current_device(self, device: Any) -> None:
        """There is one device."""

    def get_current_stream(self, device: Any) -> int:
        """The default stream."""
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        """``(major, minor)`` of an NVIDIA target."""
        return divmod(self.target.arch, 10) if self.target.backend == "cuda" else (0, 0)

    def get_active_torch_device(self) -> torch.device:
        """Where Triton would allocate."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Only launchers need C++ types, and nothing is launched."""
        return ty

    def get_device_interface(self) -> Any:
        """Torch's module of the device."""
        return torch.cpu

    def get_benchmarker(self) -> Any:
        """Every configuration takes the same time."""
        return lambda function, quantiles=None, **kwargs: [1.0, 1.0, 1.0]

    def get_empty_cache_for_benchmark(self) -> None:
        """There is no cache to empty."""
        return None

    def clear_cache(self, cache: Any) -> None:
        """There is no cache to clear."""


@contextlib.contextmanager
def replaced_launch(run: Any, autotune: Any) -> Iterator[Any]:
    """Let ``run`` and ``autotune`` stand for JITFunction.run and Autotuner.run.

    The driver, both methods and the kernels' caches are given back at the end, also after an exception.

    Yields:
        The genuine JITFunction.run.
    """
    genuine, genuine_autotune, active = JITFunction.run, Autotuner.run, driver._active
    used: set[JITFunction] = set()

    def recorded(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        used.add(self)
        return run(self, *args, **kwargs)

    JITFunction.run, Autotuner.run = recorded, autotune
    try:
        yield genuine
    finally:
        JITFunction.run, Autotuner.run, driver._active = genuine, genuine_autotune, active
        for function in used:
            for key in [k for k in function.device_caches if isinstance(k, tuple) and k[0] == "offline"]:
                del function.device_caches[key]
