"""Print what runs fused in a model, and why the rest does not."""

from __future__ import annotations

import argparse

from ._console import MEMORY_MODES, add_model

HELP = "print every block's plan, or why it stays stock"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_model(parser, "resnet50")
    parser.add_argument("--memory", choices=MEMORY_MODES, default="speed", help="default: speed")
    parser.add_argument("--batch", type=int, metavar="N", help="also every site, for so many images")
    parser.add_argument("--image", type=int, default=224, metavar="N", help="pixels of them (default: 224)")


def run(args: argparse.Namespace) -> int:
    """Fuse the model and print `resnet_fused.explain`."""
    import torch

    from ..explain import explain
    from ..fuse import fuse
    from ..train.errors import UserError
    from ..train.models import build_model, input_channels

    model, x = fuse(build_model(args.model), memory=args.memory), None
    for name in ("batch", "image"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"explain: --{name}: expected at least 1, got {getattr(args, name)}")
    if args.batch is not None:
        x = torch.empty(args.batch, input_channels(model), args.image, args.image, device="meta")
    try:
        print(explain(model, x))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"explain: {args.model}: {str(error).strip().splitlines()[0]}") from error
    return 0
