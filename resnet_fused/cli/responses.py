"""How far each layer's output spreads: the paper's Fig. 7, for your nets and your data.

A layer's response is its output after batch norm, before ReLU and add; printed is its standard deviation, in closed
form from the batch statistics of the fused net. Several models, or --plain, are overlaid in responses.png: in network
order above, ranked below. A net without a checkpoint is a fresh one, whose batch norms all give about 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from pathlib import Path
from typing import Any

from ._console import MODEL_HELP

HELP = "the standard deviation of each layer's output (the paper's Fig. 7), as a table, JSON and PNG"
_WHAT = "responses: --checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    from ..train.data import NAMES

    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{MODEL_HELP} (default: the checkpoints', else cifar-20)",
    )
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="PATH", help="for each model, a run's folder or a state_dict"
    )
    parser.add_argument("--plain", action="store_true", help="overlay the plain net of the same depth for each model")
    parser.add_argument("--data", default="auto", help=f"one of {', '.join(NAMES)} (default: auto)")
    parser.add_argument("--data-root", default="", metavar="DIR", help="where Fashion-MNIST is looked for first")
    parser.add_argument("--image-size", type=int, default=0, metavar="N", help="resize images to this many pixels")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images in a batch (default: 128)")
    parser.add_argument("--batches", type=int, default=2, metavar="N", help="training batches to pool (default: 2)")
    parser.add_argument("--kernel", default="3x3", help="which layers, by kernel; all: every one (default: 3x3)")
    parser.add_argument("--seed", type=int, default=0, help="of fresh parameters and of the batches")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--out", default=".", metavar="DIR", help="folder of responses.json and .png (default: this one)"
    )


def run(args: argparse.Namespace) -> int:
    """Build, load, look, print and write."""
    from ..analysis.plot import Curve, draw
    from ..benching.files import write_atomically, write_json
    from ..train import UserError
    from ..train.data import load

    document, picture = (Path(args.out) / f"responses.{kind}" for kind in ("json", "png"))
    try:
        document.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"responses: --out {args.out}: cannot be made: {error.strerror}") from error
    if args.batch < 2 or args.batches < 1:
        raise UserError(
            f"responses: --batch, --batches: expected at least 2 and 1, got {args.batch} and {args.batches}"
        )
    nets = _nets(args)
    dataset = load(args.data, args.data_root, args.image_size)
    print(f"data: {dataset.name} ({dataset.source}), {args.batches} batches of {args.batch}")
    curves, found = [], []
    for name, weights in nets:
        responses, plain = _look(args, dataset, name, weights)
        curves.append(Curve(name, plain, responses))
        origin = str(weights.path) if weights is not None else ""
        found.append({"model": name, "checkpoint": origin, "plain": plain, **responses.to_dict()})
        print(f"\n{name}, {origin or 'freshly initialised: about 1 everywhere, by batch norm'}\n{responses}")
        write_json(document, {"data": dataset.name, "kernel": args.kernel, "models": found}, "responses: --out")
    print(f"\n{document}")
    if importlib.util.find_spec("matplotlib") is None:
        print("not drawn: matplotlib is not installed")
    else:
        write_atomically(picture, draw(curves, f"Layer responses on {dataset.name}"), "responses: --out")
        print(picture)
    return 0


def _nets(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """Every net to look at: its name and its `Weights` or None; plain nets behind the residual ones they belong to."""
    from ..train import UserError
    from ..train.weights import read_weights

    weights: list[Any] = [read_weights(Path(path), _WHAT) for path in args.checkpoint]
    names = args.model or [found.config.get("model", "") for found in weights] or ["cifar-20"]
    if not all(names):
        raise UserError(f"{_WHAT}: a state_dict does not name its model; expected --model")
    names = [net for name in names for net in ([name, _plain_twin(name)] if args.plain else [name])]
    if weights and len(weights) != len(names):
        raise UserError(f"{_WHAT}: expected one for each of {', '.join(names)}, got {len(weights)}")
    return list(zip(names, weights or [None] * len(names)))


def _plain_twin(name: str) -> str:
    from ..train import UserError
    from ..train.models import builders

    found = re.fullmatch(r"(?:cifar-|resnet)(\d+)", name)
    twin = f"plain-{found[1]}" if found else ""
    if twin not in builders():
        known = ", ".join(other for other in builders() if other.startswith("plain-"))
        raise UserError(f"responses: --plain: expected a --model that has a plain twin ({known}), got {name!r}")
    return twin


def _look(args: argparse.Namespace, dataset: Any, name: str, weights: Any) -> tuple[Any, bool]:
    """One net's responses, and whether it is a plain one."""
    import torch

    from ..analysis import layer_responses
    from ..eager import PlainBlock
    from ..fuse import fuse
    from ..train import UserError
    from ..train.batches import Batches
    from ..train.models import build_model, input_channels
    from ..train.weights import load_weights

    torch.manual_seed(args.seed)
    model = build_model(name, num_classes=dataset.classes, in_channels=dataset.train_images.shape[1])
    if weights is not None:
        load_weights(model, weights, name, _WHAT)
    model = fuse(model.to(args.device).to(memory_format=torch.channels_last))
    batches = Batches(dataset, args.batch, args.seed, False, input_channels(model), True)
    kernel = None if args.kernel == "all" else args.kernel
    try:
        responses = layer_responses(model, (batches.train(i) for i in range(args.batches)), kernel=kernel)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"responses: {name}: {str(error).strip().splitlines()[0]}") from error
    return responses, any(isinstance(module, PlainBlock) for module in model.modules())
