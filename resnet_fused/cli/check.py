"""Check a fused model against stock PyTorch, tensor by tensor, with float64 as the judge.

One training step of the fused model, of eager in both memory formats, and of eager in float64: the
output, the input's gradient, every parameter's gradient and every buffer, then the output in eval
mode. Without --weights, batch norm gets parameters that a mistake would show in. Exit code 0 when
every tensor is within the numerics law, 1 when one is not.
"""

from __future__ import annotations

import argparse

from ._console import MEMORY_MODES, add_model

HELP = "compare a fused model with stock and float64, PASS or FAIL per tensor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    from ..checking import DTYPES

    add_model(parser, "resnet50")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="amp-*: under autocast (default: fp32)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images (default: 8)")
    parser.add_argument("--image", type=int, default=64, metavar="N", help="pixels (default: 64)")
    parser.add_argument("--weights", nargs="?", const="DEFAULT", help="pretrained weights by torchvision's name")
    parser.add_argument("--memory", choices=MEMORY_MODES, default="speed", help="default: speed")
    parser.add_argument("--eval", action="store_true", help="with batch norm in eval mode: frozen statistics")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters, the input and the gradient")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--inputs", type=int, default=3, metavar="N", help="inputs a suspect is tried on (default: 3)")
    parser.add_argument("--all", action="store_true", help="print every tensor, not just the worst")


def run(args: argparse.Namespace) -> int:
    """Build, check, print."""
    import torch

    from ..checking import check, exercise
    from ..train.errors import UserError
    from ..train.models import build_model, input_channels

    torch.manual_seed(args.seed)
    model = build_model(args.model, weights=args.weights)
    if args.weights is None:
        exercise(model, args.seed)
    shape = (args.batch, input_channels(model), args.image, args.image)
    try:
        report = check(
            model.to(args.device),
            shape=shape,
            dtype=args.dtype,
            seed=args.seed,
            training=not args.eval,
            memory=args.memory,
            inputs=args.inputs,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"check: {args.model} at {shape}: {str(error).strip().splitlines()[0]}") from error
    print(report.table(None if args.all else 12))
    return 0 if report.passed else 1
