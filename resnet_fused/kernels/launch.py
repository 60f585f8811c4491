"""Starting a kernel: the one door through which every launch of this package goes.

    launch(kernel, grid, moved, {"x_ptr": x, ...}, tile)

The launcher says which bytes the kernel moves (`Moved`), each tensor once, as an unbounded cache would
see it. Under `recording` the launches are noted, and started only if asked: so a whole training step on
meta tensors is counted, kernel by kernel, without a device and in seconds. What is counted this way is
held against the interpreter's own count in the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence["Tensor | None"]
KINDS = ("activations", "weights", "partials")


@dataclasses.dataclass(frozen=True)
class Moved:
    """The tensors a kernel reads and writes, by kind; a view stands for the part that is touched.

    ``activations``: of the size of a convolution's input or output. ``weights``: filters and their gradients.
    ``partials``: split-K partials, tile statistics and per-channel vectors. Each is ``(read, written)``.
    ``flops``: of its matrix product, a multiply-add being two; 0 without one.
    """

    activations: tuple[Tensors, Tensors] = ((), ())
    weights: tuple[Tensors, Tensors] = ((), ())
    partials: tuple[Tensors, Tensors] = ((), ())
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class LaunchRecord:
    """One launch: the kernel's name, its compile-time arguments, bytes ``(read, written)`` by kind, and FLOPs.

    ``owner``: the storage of the filter whose site it works for, as `attribute` said; 0 if nobody said.
    """

    kernel: str
    config: Mapping[str, Any]
    bytes: Mapping[str, tuple[int, int]]
    flops: int = 0
    owner: int = dataclasses.field(default=0, compare=False)

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(sum(sides) for sides in self.bytes.values())


@dataclasses.dataclass
class _Recording:
    run: bool
    anywhere: bool
    records: list[LaunchRecord]
    owner: int = 0


_recording: _Recording | None = None


@contextlib.contextmanager
def recording(run: bool = True, compiling: bool = False) -> Iterator[list[LaunchRecord]]:
    """Note every launch in the block.

    Args:
        run: False only notes them; tensors may then be on the meta device.
        compiling: what starts a kernel is replaced by what compiles it, so again any device will do.

    Yields:
        A list that gains one `LaunchRecord` per launch.
    """
    global _recording
    previous, _recording = _recording, _Recording(run, compiling or not run, [])
    try:
        yield _recording.records
    finally:
        _recording = previous


def is_counting() -> bool:
    """Whether launches are noted, or compiled, and not started: any device will then do."""
    return _recording is not None and _recording.anywhere


def storage_of(t: Tensor) -> int:
    """What tells one tensor's memory from another's while both live, on the meta device too."""
    return t.untyped_storage()._cdata


def attribute(weight: Tensor) -> None:
    """Say that what follows, where launches are noted, is work for the site with the filter ``weight``."""
    if _recording is not None:
        _recording.owner = storage_of(weight)


def owner() -> int:
    """The filter's storage that `attribute` named last; 0 for none."""
    return 0 if _recording is None else _recording.owner


def nbytes(tensors: Tensors) -> int:
    """Bytes of the elements of ``tensors``, each view's own."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def launch(
    kernel: Any, grid: tuple[int, ...], moved: Moved, arguments: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Start ``kernel`` on ``grid`` on the current stream; an empty grid starts nothing.

    Args:
        moved: what it reads and writes.  arguments: its run-time arguments by name.
        config: its compile-time arguments and Triton's options (``num_warps``, ``num_stages``).
    """
    if 0 in grid:
        return
    if _recording is not None:
        counted = {kind: tuple(nbytes(side) for side in getattr(moved, kind)) for kind in KINDS}
        note = (dict(config), counted, moved.flops, _recording.owner)
        _recording.records.append(LaunchRecord(kernel.fn.__name__, *note))  # type: ignore[arg-type]
        if not _recording.run:
            return
    device = next(t.device for t in arguments.values() if isinstance(t, Tensor))
    # Triton launches on torch's current device and stream; a tensor may be on another device.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](**arguments, **config)
