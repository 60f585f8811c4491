"""Compile every Triton kernel of real networks for GPUs that need not be here, and print what came out.

For each kernel, configuration, dtype and target: registers, spills, local memory, shared memory and
whether a block may have that much, resident blocks of a multiprocessor, the tensor-core instruction,
the 128-bit loads, stores and asynchronous copies in the code, and for the largest launch of it at batch 256
the megabytes that it reads and writes and its FLOPs for each of those bytes. Nothing runs and no time is
measured.

Rows that break a bound come first: a spill, local memory, shared memory over the target's limit, no
tensor core where the source multiplies tiles in a precision that has one. Then exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from ._console import print_table, write_json

HELP = "registers, spills, shared memory and instructions of every kernel, per target"
_MODELS = ("resnet50", "resnet18", "cifar-20")
_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
_MB = 1e6
_DTYPES = ("bf16", "fp16", "tf32", "fp32")
_COLUMNS = (
    *("kernel", "target", "dtype", "tile", "regs", "spills", "local", "shared", "of", "blocks/SM", "occupancy"),
    *("tensor core", "ld.128", "st.128", "cp.async", "MB", "FLOP/B", "bound"),
)
_SUMMARY = (
    *("kernel", "target", "dtype", "configs", "regs", "shared", "of", "blocks/SM", "tensor core"),
    *("ld.128", "st.128", "cp.async", "MB", "FLOP/B"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--model", choices=(*_MODELS, "all"), default="all", help="default: all")
    parser.add_argument("--targets", type=_names(_TARGETS), default=_TARGETS, help=f"default: {','.join(_TARGETS)}")
    parser.add_argument("--dtypes", type=_names(_DTYPES), default=_DTYPES, help=f"default: {','.join(_DTYPES)}")
    parser.add_argument("--candidates", action="store_true", help="also every tile that tune may try")
    parser.add_argument("--all", action="store_true", help="print every configuration, not a summary")
    parser.add_argument("--json", metavar="FILE", help="write every row there")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")


def _names(known: tuple[str, ...]) -> Any:
    """An argparse type: comma-separated names out of ``known``."""

    def names(text: str) -> tuple[str, ...]:
        given = tuple(name.strip() for name in text.split(","))
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {','.join(unknown)}")
        return given

    return names


def run(args: argparse.Namespace) -> int:
    """Compile, print; 0 when every row keeps the bounds, 1 when one does not."""
    from ..train.errors import UserError

    if args.jobs < 1:
        raise UserError(f"kernels: --jobs: expected at least 1, got {args.jobs}")
    try:
        from ..compiling.offline import missing_tools
    except ImportError as error:
        raise UserError(f"kernels: Triton cannot be imported: {error}") from error
    if reason := missing_tools():
        raise UserError(f"kernels: {reason}")
    models = _MODELS if args.model == "all" else (args.model,)
    work = [(model, target, dtype) for dtype in args.dtypes for target in args.targets for model in models]
    if args.candidates:
        work += [(None, target, dtype) for dtype in args.dtypes for target in args.targets]
    rows = _compile(work, args.jobs)
    if args.json:
        write_json(args.json, [dataclasses.asdict(row) for row in rows], "kernels")
    _print(rows, args.all)
    return 1 if any(row.broken for row in rows) else 0


def _compile(work: list[tuple[str | None, str, str]], jobs: int) -> list[Any]:
    import sys

    from ..compiling.table import merge
    from ..train.progress import Progress

    rows: list[Any] = []
    with Progress(len(work), stream=sys.stderr) as progress:
        for done, (part, found) in enumerate(_parts(work, jobs), 1):
            rows += found
            progress.update(done, " ".join(name or "candidates" for name in part))
    return merge(rows)


def _parts(work: list[tuple[str | None, str, str]], jobs: int) -> Iterator[tuple[tuple[str | None, str, str], Any]]:
    """Every part of the work and its rows, in the order in which they are done."""
    import concurrent.futures
    import multiprocessing

    from ..compiling.catalogue import compile_part

    if jobs == 1:
        yield from ((part, compile_part(part)) for part in work)
        return
    # A process that is started afresh has no threads of torch or of the compiler to inherit.
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        parts = {pool.submit(compile_part, part): part for part in work}
        yield from ((parts[future], future.result()) for future in concurrent.futures.as_completed(parts))
    finally:
        # After Ctrl-C nobody waits for what is still being compiled.
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def _cells(row: Any) -> list[str]:
    resident = "-" if row.blocks is None else str(row.blocks)
    occupancy = "-" if row.occupancy is None else f"{row.occupancy:.0%}"
    numbers = (row.registers, row.spills, max(row.local_bytes, row.stack_bytes), row.shared_bytes, row.shared_limit)
    memory = (row.wide_loads, row.wide_stores, row.cp_async)
    verdict = "; ".join(row.broken) or "ok"
    head = (row.kernel, row.target, row.dtype, row.tile())
    work = (f"{row.moved / _MB:.1f}", _intensity([row]))
    return [*head, *map(str, numbers), resident, occupancy, row.tensor_core, *map(str, memory), *work, verdict]


def _intensity(rows: list[Any]) -> str:
    values = [round(row.intensity) for row in rows if row.intensity is not None]
    return _span(values) if values else "-"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _summary(rows: list[Any]) -> list[list[str]]:
    """One line per kernel, target and dtype: the range over its configurations."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.target, row.dtype), []).append(row)
    lines = []
    for key, group in sorted(groups.items()):
        resident = [row.blocks for row in group if row.blocks is not None]
        cores = " ".join(sorted({row.tensor_core for row in group}))
        counts = [_span([getattr(row, name) for row in group]) for name in ("wide_loads", "wide_stores", "cp_async")]
        shared = _span([row.shared_bytes for row in group])
        registers = _span([row.registers for row in group])
        blocks = _span(resident) if resident else "-"
        work = [_span([round(row.moved / _MB) for row in group]), _intensity(group)]
        limit = str(group[0].shared_limit)
        lines.append([*key, str(len(group)), registers, shared, limit, blocks, cores, *counts, *work])
    return lines


def _print(rows: list[Any], everything: bool) -> None:
    broken = [row for row in rows if row.broken]
    if broken:
        print_table(_COLUMNS, [_cells(row) for row in broken])
        for row in broken:
            print(f"{row.kernel} {row.target} {row.dtype} {row.tile()}: {', '.join(row.used_by)}: {row.geometry()}")
        print()
    if everything:
        print_table(_COLUMNS, [_cells(row) for row in rows if not row.broken])
    else:
        print_table(_SUMMARY, _summary(rows))
    print(f"\n{len(rows)} kernels compiled, {len(broken)} break a bound")
