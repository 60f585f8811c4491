"""What may run at a site: every candidate is a table of winners under which the site functions run it.

A new way to run a site on some engine is a name in `variants`, which `plan` must know how to choose.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .. import plan, winners
from ..engines import cpu_plan
from ..kernels import tiles
from ..kernels.target import Target
from ..winners import Winner
from .law import Law, results
from .race import Run
from .sites import Inputs, SiteProblem

Table = Mapping[str, Winner]


class Candidate(NamedTuple):
    """A name to print, and the table that makes the site functions run it."""

    name: str
    table: Table


def variants(problem: SiteProblem) -> list[str]:
    """The variants that can run the problem, the rules' own first."""
    shape, engine = problem.shape, problem.engine
    with winners.using({}):
        if problem.extension:
            default = plan.shortcut(shape, engine).name
            names = [plan.LIBRARY, *_ours(engine, shape), plan.EXTENSION]
        else:
            default = _rule(engine, shape)
            names = [plan.LIBRARY, *_ours(engine, shape)]
    if default == plan.PRODUCT:  # inside its site's op, where nothing else is faster
        return [default]
    return [default, *(name for name in names if name != default)]


def _ours(engine: str, shape: plan.ConvShape) -> list[str]:
    """The name of our own kernels, where they can run the shape and the plan asks for them."""
    cannot = {"triton": plan.impossible, "cpu": cpu_plan.impossible}.get(engine)
    own = cannot is not None and cannot(shape) is None and not (engine == "cpu" and shape.projection)
    return [plan.OWN] if own else []


def _rule(engine: str, shape: plan.ConvShape) -> str:
    if engine == "triton":
        return plan.choose(shape).name
    return cpu_plan.variant(shape).name if engine == "cpu" else plan.LIBRARY


def variant(problem: SiteProblem, name: str, tile_table: Table) -> Candidate:
    """The candidate that runs variant ``name``, with measured tiles."""
    return Candidate(name, {**tile_table, problem.key: Winner(name, "")})


@contextlib.contextmanager
def in_private() -> Iterator[Mapping[Any, str]]:
    """Keep what fails in the block from the rest of the process: no warning, no refusal that stays."""
    with plan.trial() as refused, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield refused


def faults(
    tried: Sequence[Candidate], problem: SiteProblem, prepared: Sequence[Inputs], part: str | None = None
) -> dict[str, str]:
    """Why candidates are out, by their names: they cannot run the problem, or break the numerics law.

    ``part``: as in `law.results`; None: all of it. One use after another, so that one law is in memory at a time.
    """
    found: dict[str, str] = {}
    for inputs in prepared:
        law = Law(inputs, problem.shape.tf32, part)
        for candidate in tried:
            if candidate.name not in found and (reason := _fault(candidate, problem, inputs, law, part)):
                found[candidate.name] = reason
    return found


def _fault(candidate: Candidate, problem: SiteProblem, inputs: Inputs, law: Law, part: str | None) -> str | None:
    with in_private() as refused, winners.using(candidate.table):
        try:
            got = results(inputs, part)
        except Exception as error:  # whatever it is, this candidate is not the user's problem
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error) else ''}"
        return refused[problem.shape] if problem.shape in refused else law.broken_by(got)


def timed(candidate: Candidate, prepared: Sequence[Inputs], part: str | None = None) -> Run:
    """A part of every use of the problem, by the candidate."""
    work = WORK[part]

    def run() -> None:
        with winners.using(candidate.table):
            for inputs in prepared:
                work(inputs)

    return run


def _both_ways(inputs: Inputs) -> None:
    inputs.forward()
    inputs.backward()


# What is timed, by part; the tiles of each kind of product have a part to themselves.
WORK: dict[str | None, Callable[[Inputs], object]] = {
    None: _both_ways,
    "fwd": Inputs.forward,
    "dgrad": lambda inputs: inputs.backward((inputs.needs[0], False)),
    "wgrad": lambda inputs: inputs.backward((False, inputs.needs[1])),
}
TILED = ("fwd", "dgrad", "wgrad")


def tile_problems(kind: str, own: Candidate, prepared: Sequence[Inputs]) -> dict[str, tuple[tiles.Problem, Target]]:
    """The products of one kind for which our kernels choose a tile at this site, by their keys."""
    with in_private(), winners.using(own.table), tiles.noting() as noted:
        for inputs in prepared:
            WORK[kind](inputs)
    return {tiles.problem_key(*found): found for found in noted if found[0].kind == kind}


def tile_candidates(key: str, problem: tiles.Problem, target: Target, own: Candidate) -> list[Candidate]:
    """Every tile for one product, the rules' own first."""
    return [
        Candidate(_tile_name(tile), {**own.table, key: Winner(tiles.as_choice(tile), "")})
        for tile in tiles.candidates(problem, target)
    ]


def _tile_name(tile: tiles.Tile) -> str:
    split = f" split {tile.split}" if tile.split > 1 else ""
    return f"{tile.rows}x{tile.cols}x{tile.depth} warps {tile.warps} stages {tile.stages}{split}"
