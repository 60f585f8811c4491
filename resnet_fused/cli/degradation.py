"""Train plain and residual nets of several depths one after another and draw their error curves (Fig. 1 and 6).

Deeper plain nets have a higher training error than shallower ones; residual nets do not. Every net has a folder of its
own below --out, as of `resnet-fused train`; the same command again goes on where it was stopped, and repeats no run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._console import print_table

HELP = "error curves of plain against residual nets (the paper's Fig. 1 and 6)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    from ..train.data import NAMES

    parser.add_argument("--depths", default="20,56", metavar="N,N", help="layers, 6n + 2 (default: 20,56)")
    parser.add_argument("--recipe", default="quick", metavar="NAME", help="as of `train` (default: quick)")
    parser.add_argument(
        "--iterations", type=int, default=0, metavar="N", help="steps of each run (default: the recipe's)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=0, metavar="N", help="images per step (default: the recipe's)"
    )
    parser.add_argument("--validation", type=int, default=0, metavar="N", help="evaluate on N held-out training images")
    parser.add_argument("--data", default="auto", help=f"one of {', '.join(NAMES)} (default: auto)")
    parser.add_argument("--data-root", default="", metavar="DIR", help="where Fashion-MNIST is looked for first")
    parser.add_argument("--image-size", type=int, default=0, metavar="N", help="resize images to this many pixels")
    parser.add_argument("--memory", default="speed", help="what the fused blocks keep for backward (default: speed)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the batches")
    parser.add_argument("--out", default="runs/degradation", metavar="DIR", help="default: runs/degradation")


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, and draw."""
    from ..benching.files import write_atomically, write_json
    from ..train import Stop, TrainConfig, UserError
    from ..train import degradation as curves
    from ..train.data import load

    parts = args.depths.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise UserError(f"degradation: --depths: expected numbers as 20,56, got {args.depths!r}")
    nets = curves.nets([int(part) for part in parts])
    names = ("recipe", "iterations", "batch_size", "validation", "data", "data_root", "image_size", "memory")
    base = TrainConfig(**{name: getattr(args, name) for name in (*names, "device", "threads", "seed")})
    dataset = load(base.data, base.data_root, base.image_size)
    print(f"data: {dataset.name} ({dataset.source})")
    out, found = Path(args.out), []
    with Stop().listening() as stop:
        for net in nets:
            done = curves.train_net(net, base, dataset, out, stop, sys.stdout)
            if done is None:
                print(f"stopped; to go on: the same command, with --out {out}")
                return 128 + stop.signal
            found.append(done)
    evaluated = "validation" if base.validation else "test"
    print_table(["net", "training error", f"{evaluated} error"], curves.table(found))
    document = {"data": dataset.name, "recipe": base.recipe, "evaluated": evaluated, "runs": found}
    write_json(out / "degradation.json", document, "degradation: --out")
    print(out / "degradation.json")
    picture = curves.draw(found, evaluated, f"Plain and residual nets on {dataset.name}, recipe {base.recipe}")
    if picture is None:
        print("not drawn: matplotlib is not installed")
    else:
        write_atomically(out / "degradation.png", picture, "degradation: --out")
        print(out / "degradation.png")
    return 0
