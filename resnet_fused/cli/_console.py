"""Tables on standard output, and arguments that several commands share."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL_HELP = "a builder's name (resnet50, cifar-20, plain-20, ...), torchvision:NAME or module:function"
MEMORY_MODES = ("speed", "lean", "min")


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    """``--model``."""
    parser.add_argument("--model", default=default, help=f"{MODEL_HELP} (default: {default})")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: by rich on a terminal where it is installed, else in plain columns."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich import box
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*columns, box=box.SIMPLE)
        for row in rows:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    for line in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def write_json(path: str, found: Any, command: str) -> None:
    """Write ``found`` for ``--json``.

    Raises:
        UserError: the file cannot be written.
    """
    from ..benching.files import write_json as write

    write(Path(path), found, f"{command}: --json")
