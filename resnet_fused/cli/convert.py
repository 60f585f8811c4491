"""Translate a ResNet checkpoint from one code base's names to another's.

The format is found out unless --from names it. Nothing is left out silently: what the destination has no
place for must be named by --drop, and the report says what was carried, created and left out. A checkpoint's
other entries are kept, its optimizer and EMA converted. Without OUT the report alone is printed. Exit code 1
when the file cannot be converted.
"""

from __future__ import annotations

import argparse
import sys

HELP = "translate a checkpoint: torchvision, timm, transformers, mmdet, detectron2, ..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    from ..checkpoints.formats import ALIASES, FORMATS
    from ..checkpoints.holding import DROPPABLE

    names = [*FORMATS, *ALIASES]
    parser.epilog = "formats:\n" + "\n".join(f"  {form.name:14}{form.about}" for form in FORMATS.values())
    parser.add_argument("source", metavar="IN", help="a file of torch.save, or .safetensors")
    parser.add_argument("out", metavar="OUT", nargs="?", help="the file to write, in the way its name says")
    parser.add_argument("--to", default="torchvision", choices=names, metavar="FORMAT", help="default: torchvision")
    parser.add_argument("--from", dest="src", choices=names, metavar="FORMAT", help="default: found out")
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="WHAT",
        help=f"may be left out: {', '.join(DROPPABLE)} or a pattern of keys ('neck.*'); may be repeated",
    )
    parser.add_argument("--lenient", action="store_true", help="leave out keys of unknown meaning")
    parser.add_argument("--stages", metavar="N,N,...", help="blocks in each stage of a source that counts them through")
    parser.add_argument("--entry", metavar="NAME", help="the checkpoint's entry to convert")
    parser.add_argument("--src-prefix", default="", metavar="TEXT", help="convert only keys that begin so")
    parser.add_argument("--dst-prefix", metavar="TEXT", help="begin the keys so")


def run(args: argparse.Namespace) -> int:
    """Convert, print the report."""
    from ..checkpoints import ConversionError
    from ..checkpoints.files import convert_file
    from ..train.errors import UserError

    try:
        stages = None if args.stages is None else [int(size) for size in args.stages.split(",")]
    except ValueError as error:
        raise UserError(f"convert: --stages: expected numbers as in 3,4,6,3, got {args.stages!r}") from error
    try:
        report = convert_file(
            args.source,
            args.out,
            args.src,
            args.to,
            drop=args.drop,
            strict=not args.lenient,
            stages=stages,
            entry=args.entry,
            src_prefix=args.src_prefix,
            dst_prefix=args.dst_prefix,
        )
    except ConversionError as error:
        print(f"resnet-fused: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        name = error.filename or args.source
        raise UserError(f"convert: {name}: {error.strerror or error}") from error
    print(report)
    if args.out is not None:
        print(f"written: {args.out}")
    return 0
