"""``resnet-fused COMMAND``: every module of this package without a leading underscore is a command.

A command module has ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args) -> int``; it imports
what is heavy inside ``run``, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resnet-fused", description="Fused residual blocks for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        if found.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{found.name}")
        description = (module.__doc__ or module.HELP).strip()
        command = commands.add_parser(
            found.name, help=module.HELP, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes the process's.

    Returns:
        The exit code: 0, 1 for a check that failed, 2 for bad input (one line on stderr), 130 for Ctrl-C.
    """
    from ..train.errors import UserError

    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"resnet-fused: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("resnet-fused: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `resnet-fused ... | head`: the reader has gone; nothing may be flushed to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
