"""Which GPU a tile is chosen for: asked of torch at a launch, never at import."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch

from .. import winners

KIB = 1024
DEFAULT = "sm_90"
# Most dynamic shared memory of one block in bytes, and multiprocessors of the largest common part.
_SHARED = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227}
_PROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU as tile choice sees it: architecture, shared memory per block in bytes, multiprocessors.

    ``name`` is that of a real device (`winners.device_name`); the rules do not look at it.
    """

    arch: str
    shared_bytes: int
    processors: int
    name: str = ""

    @property
    def has_tcgen05(self) -> bool:
        """Whether the tensor cores accumulate in a memory of their own (sm_100 and sm_103)."""
        return self.arch in ("sm_100", "sm_103")


_pretended: Target | None = None


def named(arch: str) -> Target:
    """The target called ``sm_<number>`` or ``gfx<name>``; an unknown one gets the smallest shared memory.

    Raises:
        ValueError: any other name.
    """
    if not arch.startswith(("sm_", "gfx")):
        raise ValueError(f"target: expected sm_<number> or gfx<name>, got {arch!r}")
    shared = 64 if arch.startswith("gfx") else _SHARED.get(arch, 99)
    return Target(arch, shared * KIB, _PROCESSORS.get(arch, 108))


@functools.cache
def _of_device(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    name = winners.device_name(torch.device("cuda", index))
    return dataclasses.replace(named(arch), processors=properties.multi_processor_count, name=name)


def of(device: torch.device) -> Target:
    """The target of ``device``; `DEFAULT` for a device that is no GPU (counting and emulation)."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return named(DEFAULT)
    return _of_device(torch.cuda.current_device() if device.index is None else device.index)


@contextlib.contextmanager
def pretend(arch: str) -> Iterator[Target]:
    """Choose tiles for ``arch`` in the block, whatever the device."""
    global _pretended
    previous, _pretended = _pretended, named(arch)
    try:
        yield _pretended
    finally:
        _pretended = previous
