"""Print what runs fused in a model, and why the rest does not."""

from __future__ import annotations

import argparse

from ._console import MEMORY_MODES, add_model

HELP = "print every block's plan, or why it stays stock"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_model(parser, "resnet50")
    parser.add_argument("--memory", choices=MEMORY_MODES, default="speed", help="default: speed")


def run(args: argparse.Namespace) -> int:
    """Fuse the model and print `resnet_fused.explain`."""
    from ..explain import explain
    from ..fuse import fuse
    from ..train.models import build_model

    print(explain(fuse(build_model(args.model), memory=args.memory)))
    return 0
