"""Tile choice: what was measured for the problem on the target, else a pure function of both; no device is asked.

A convolution is a matrix product rows x cols over a depth:

    fwd      rows NPQ, cols K, depth C, times taps
    dgrad    rows NHW of a parity class, cols C, depth K, times taps
    wgrad    rows K, cols C, times taps, depth NPQ, split over programs whose results are added in order

The rules' choice (the first candidate) is made from what the compiler reports, not from timings: no spill on any
target, two or more blocks of eight warps per multiprocessor where the product is bound by bandwidth (a 1x1 of few
channels wants loads in flight), one large block where the tensor cores bind it. The candidates after it are for
measuring on the user's device. Shared memory is bounded by an estimate that is held against the compiler's figure in
the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

import torch

from .. import winners
from .target import Target

_SIDES = (16, 32, 64, 128)
_LEAST_ROWS = 64  # of an output tile: a warpgroup's product has 64 rows
_FLOPS_PER_BYTE = 200  # of the parts wgrad can keep busy: about what separates compute from bandwidth on H100
_PARTIAL_BYTES = 8  # of one partial product in float32, written and read
_MOST_PARTS = 256

# (rows, cols, depth, warps, stages), the preferred first
_Sizes = tuple[int, int, int, int, int]
_NARROW: dict[str, tuple[_Sizes, ...]] = {
    "fwd thin": ((128, 64, 32, 8, 4), (64, 128, 64, 8, 3), (128, 64, 64, 8, 3), (128, 128, 64, 8, 3)),
    "fwd dense": ((128, 128, 64, 8, 3), (128, 128, 32, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 4)),
    "fwd join": ((128, 64, 32, 8, 4), (128, 64, 32, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3)),
    "dgrad": ((64, 128, 64, 8, 3), (128, 64, 64, 8, 3), (128, 128, 32, 8, 3), (64, 64, 64, 4, 3)),
    "wgrad": ((128, 128, 32, 8, 3), (64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (64, 128, 64, 8, 3)),
}
_TF32: dict[str, tuple[_Sizes, ...]] = {
    "fwd": ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3)),
    "dgrad": ((64, 64, 32, 4, 3), (128, 64, 32, 8, 2)),
    "wgrad": ((64, 64, 32, 4, 3), (128, 64, 32, 8, 2)),
}
_EXACT: tuple[_Sizes, ...] = ((64, 64, 16, 8, 2), (64, 32, 16, 4, 2))
_SMALL_SHARED: tuple[_Sizes, ...] = ((64, 64, 32, 4, 2), (64, 64, 16, 4, 2))  # for targets of 64 KiB


@dataclasses.dataclass(frozen=True)
class Tile:
    """One configuration: block sizes, warps, pipeline stages, and for wgrad the number of splits of the depth."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    split: int = 1

    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


_noted: list[tuple[Problem, Target]] | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A convolution's matrix product; ``depth`` is without the taps.

    Args:
        kind: fwd, dgrad or wgrad.  loads: tensors read per element of the operand that is made while loading.
        exact: float32 without TF32, which no tensor core computes.
    """

    kind: str
    rows: int
    cols: int
    depth: int
    taps: int
    dtype: torch.dtype
    loads: int = 1
    exact: bool = False


def _side(size: int, most: int, least: int = 16) -> int:
    """The smallest block side that holds ``size``, within ``least`` and ``most``."""
    return next((side for side in _SIDES if least <= side <= most and side >= size), most)


def shared_bytes(problem: Problem, tile: Tile) -> int:
    """An upper estimate of the shared memory of a block in bytes: stages in flight, and the transformed operand."""
    first, second = tile.rows * tile.depth, tile.depth * tile.cols
    vectors = 8 * 4 * tile.depth
    stage = (problem.loads * first + second) * problem.dtype.itemsize + vectors
    return stage * max(tile.stages - 1, 1) + 2 * (first + second) * problem.dtype.itemsize


def _table(problem: Problem, target: Target) -> tuple[_Sizes, ...]:
    if problem.exact:
        return (*_EXACT, *_SMALL_SHARED)
    table = _TF32 if problem.dtype == torch.float32 else _NARROW
    kind = problem.kind
    if kind == "fwd" and table is _NARROW:
        bytes_per_flop_pair = 1 / (problem.depth * problem.taps) + 1 / problem.cols
        dense = 1 / bytes_per_flop_pair >= _FLOPS_PER_BYTE
        kind = "fwd join" if problem.loads > 1 else "fwd dense" if dense else "fwd thin"
    sizes = table[kind]
    if target.has_tcgen05 and (kind, problem.taps > 1) in (("fwd thin", False), ("fwd join", True)):
        sizes = (*sizes[1:2], *sizes[:1], *sizes[2:])  # the first spills a few registers there
    return (*sizes, *_SMALL_SHARED)


def _fitted(problem: Problem, sizes: _Sizes, target: Target) -> Tile:
    """The tile of ``sizes`` for this problem: no side larger than the problem needs, and a split of the depth."""
    rows, cols, depth, warps, stages = sizes
    wgrad = problem.kind == "wgrad"
    rows = _side(problem.rows, rows, 16 if wgrad else _LEAST_ROWS)
    cols = _side(problem.cols, cols)
    depth = depth if wgrad else _side(problem.depth, depth)
    if rows * cols <= 64 * 64 and not problem.exact:
        warps = 4
    tile = Tile(rows, cols, depth, warps, stages)
    return dataclasses.replace(tile, split=_split(problem, tile, target)) if wgrad else tile


def _split(problem: Problem, tile: Tile, target: Target) -> int:
    """Parts of the depth, by a modelled cost: whole waves of programs, and the partial sums written and read.

    FLOPs count as bytes at `_FLOPS_PER_BYTE`; a part has at least eight steps.
    """
    programs = math.ceil(problem.rows / tile.rows) * math.ceil(problem.cols / tile.cols) * problem.taps
    filters = problem.rows * problem.cols * problem.taps
    work = 2 * filters * problem.depth / _FLOPS_PER_BYTE
    resident = target.processors * (1 if tile.warps > 4 else 2)

    def cost(split: int) -> float:
        waves = programs * split / resident
        return work * math.ceil(waves) / waves + _PARTIAL_BYTES * split * filters

    most = max(1, min(_MOST_PARTS, math.ceil(problem.depth / tile.depth) // 8))
    return min(range(1, most + 1), key=cost)


def candidates(problem: Problem, target: Target) -> list[Tile]:
    """Every configuration to measure for the problem, the rules' own choice first; all fit the target.

    A target's shared memory may be too small for the estimate of every one: then the smallest is the only one.
    """
    tiles = list(dict.fromkeys(_fitted(problem, sizes, target) for sizes in _table(problem, target)))
    fitting = [tile for tile in tiles if shared_bytes(problem, tile) <= target.shared_bytes]
    return fitting or [min(tiles, key=lambda tile: shared_bytes(problem, tile))]


@functools.lru_cache(maxsize=4096)
def problem_key(problem: Problem, target: Target) -> str:
    """The problem in words that hold all of it: what `winners` knows it by."""
    loads = f", {problem.loads} loads" if problem.loads > 1 else ""
    what = (
        f"tile of {problem.kind}, {problem.rows}x{problem.cols}, depth {problem.depth}, {problem.taps} taps{loads}, "
        f"{str(problem.dtype).removeprefix('torch.')}{', exact' if problem.exact else ''}"
    )
    return winners.store.problem_key(target.name or target.arch, what)


def as_choice(tile: Tile) -> tuple[int, ...]:
    """The tile as `winners` keeps it."""
    return dataclasses.astuple(tile)


def _measured(problem: Problem, target: Target) -> Tile | None:
    """What was measured for the problem, where it is a tile that fits."""
    if target.name:
        winners.ready(target.name)
    found = winners.lookup(problem_key(problem, target)) if winners.token else None
    if found is None or len(found.choice) != len(dataclasses.fields(Tile)) or isinstance(found.choice, str):
        return None
    tile = Tile(*found.choice)
    powers = all(n & (n - 1) == 0 for n in (tile.rows, tile.cols, tile.depth, tile.warps))
    return tile if powers and shared_bytes(problem, tile) <= target.shared_bytes else None


@contextlib.contextmanager
def noting() -> Iterator[list[tuple[Problem, Target]]]:
    """Yields a list that gains every problem for which a tile is chosen in the block."""
    global _noted
    previous, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = previous


def choose(problem: Problem, target: Target) -> Tile:
    """The measured configuration, else the rules': the first candidate."""
    if _noted is not None:
        _noted.append((problem, target))
    return _measured(problem, target) or candidates(problem, target)[0]
