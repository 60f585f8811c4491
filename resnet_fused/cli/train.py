"""Train a net of the residual family with fused blocks, or beside its stock twin (--compare).

A run is a function of its settings and its data: --resume goes on bitwise as if it had never
stopped. Ctrl-C finishes the step, saves, and prints how to go on.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ._console import MEMORY_MODES, MODEL_HELP

HELP = "train a model, fused or beside its stock twin"
# What may change between a run and its continuation; everything else is the checkpoint's.
_FREE_ON_RESUME = ("data_root", "device")
# Three nets side by side: the third shows how far two layouts of stock PyTorch part by rounding alone.
_DEMO = {"model": "cifar-20", "data": "auto", "recipe": "demo", "compare": True, "yardstick": True, "eval_every": 60}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags; one that is not given is absent from the result, so that --resume can tell."""
    from ..train.data import NAMES
    from ..train.recipes import RECIPES

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)

    recipes = "; ".join(f"{name}: {recipe.summary}" for name, recipe in RECIPES.items())
    add("--model", f"{MODEL_HELP} (default: cifar-20)")
    add("--data", f"one of {', '.join(NAMES)} (default: auto, Fashion-MNIST if it can be had, else digits)")
    add("--data-root", "where Fashion-MNIST is looked for first, and downloaded to", metavar="DIR")
    add("--image-size", "resize images to this many pixels", type=int, metavar="N")
    add("--recipe", f"{recipes} (default: quick)", metavar="NAME")
    add("--epochs", "length of the run in epochs", type=int, metavar="N")
    add("--iterations", "length of the run in steps; the schedule scales with it", type=int, metavar="N")
    add("--batch-size", "images per step", type=int, metavar="N")
    add("--lr", "peak learning rate", type=float)
    add("--compare", "train the stock twin alongside and compare", action="store_true")
    add("--yardstick", "with a third net: stock in the other memory format, which parts too", action="store_true")
    add("--amp", "mixed precision: off, bf16 or fp16 (default: off)", choices=("off", "bf16", "fp16"))
    add("--memory", "what the fused blocks keep for backward (default: speed)", choices=MEMORY_MODES)
    add("--channels-last", "memory format of all lanes (default: on)", action=argparse.BooleanOptionalAction)
    add("--threads", "CPU threads (default: torch's choice)", type=int, metavar="N")
    add("--seed", "of the parameters and the batches (default: 0)", type=int)
    add("--device", "default: the accelerator if there is one, else cpu")
    add("--eval-every", "steps between evaluations (default: a tenth of the run)", type=int, metavar="N")
    add("--checkpoint-every", "steps between checkpoints (default: a tenth of the run)", type=int, metavar="N")
    parser.add_argument("--out", help="folder for the run (default: a new one under runs)", metavar="DIR")
    parser.add_argument("--resume", help="go on from this checkpoint, or from this run's folder", metavar="PATH")
    parser.add_argument(
        "--demo",
        action="store_true",
        help="a few minutes on two cores: cifar-20 with --compare and --yardstick on Fashion-MNIST, or digits. "
        "Option A shortcuts: what the paper uses on small images, without a parameter of their own",
    )


def run(args: argparse.Namespace) -> int:
    """Train, and report."""
    from ..train import Stop
    from ..train.progress import Progress

    trainer = _resumed(args) if args.resume else _fresh(args)
    config = trainer.config
    names = " beside ".join(lane.name for lane in trainer.lanes)
    print(f"{config.model}: {names}, {config.iterations} iterations of {config.batch_size} images, {config.device}")
    print(f"data: {trainer.dataset.name} ({trainer.dataset.source})")
    try:
        with Stop().listening() as stop, Progress(config.iterations, trainer.iteration) as progress:
            complete = trainer.run(progress, stop)
        if not complete:
            print(f"stopped after {trainer.iteration} of {config.iterations} iterations, saved {trainer.checkpoint}")
            print(f"to go on: resnet-fused train --resume {trainer.out}")
            return 128 + stop.signal
        lines, picture = trainer.finish()
    finally:
        trainer.close()
    print("\n".join(lines))
    print(f"{'checkpoint':<20}{trainer.checkpoint}")
    print(f"{'curves':<20}{picture or 'not drawn: matplotlib is not installed'}")
    return 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line."""
    import dataclasses

    from ..train import TrainConfig

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _fresh(args: argparse.Namespace) -> Any:
    from ..train import TrainConfig, Trainer, check_fits, complete
    from ..train.data import load

    settings = {"device": _default_device(), **(_DEMO if args.demo else {}), **_given(args)}
    config = TrainConfig(**settings)
    check_fits(config)
    out = _new_folder(args.out, config.model)
    dataset = load(config.data, config.data_root, config.image_size)
    return Trainer(complete(config, dataset), dataset, out)


def _resumed(args: argparse.Namespace) -> Any:
    import dataclasses

    from ..train import TrainConfig, Trainer, UserError, check_fits, checkpoint
    from ..train.data import load

    state = checkpoint.load(Path(args.resume))
    config = TrainConfig.from_dict(state["config"])
    given = _given(args)
    changed = [n for n, value in given.items() if n not in _FREE_ON_RESUME and value != getattr(config, n)]
    if changed or args.demo:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed) or "--demo"
        raise UserError(f"train: --resume takes the run's own settings; it does not go with {flags}")
    config = dataclasses.replace(config, **given)
    check_fits(config)
    dataset = load(config.data, config.data_root, config.image_size)
    out = _writable(Path(args.out) if args.out else checkpoint.locate(Path(args.resume)).parent)
    return Trainer(config, dataset, out, state)


def _new_folder(out: str | None, model: str) -> Path:
    """The run's folder: never one that holds another run."""
    from ..train import UserError, checkpoint

    if out is not None:
        if (Path(out) / checkpoint.NAME).exists():
            raise UserError(
                f"train: --out {out}: holds a run already; go on with --resume {out}, or name another folder"
            )
        return _writable(Path(out))
    stem = f"{model.replace(':', '-')}"
    number = 1
    while (folder := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return _writable(folder)


def _writable(folder: Path) -> Path:
    from ..train import UserError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train: --out {folder}: cannot be made: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"train: --out {folder}: cannot be written to")
    return folder
