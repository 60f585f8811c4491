"""Train a net of the residual family with fused blocks, or beside its stock twin (--compare).

A run is a function of its settings and its data: --resume goes on bitwise as if it had never
stopped. Ctrl-C finishes the step, saves, and prints how to go on.

On several processes: torchrun --nproc-per-node 2 -m resnet_fused train ... is the same run, with every
batch of --batch-size images split over the ranks. A checkpoint goes on with any number of ranks. With
--out DIR --resume auto the same command starts and goes on, as torchrun --max-restarts wants it.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any

from ._console import MEMORY_MODES, MODEL_HELP

HELP = "train a model, fused or beside its stock twin"
# What may change between a run and its continuation; everything else is the checkpoint's.
_FREE_ON_RESUME = ("data_root", "device")
_AUTO = "auto"
_LOST = 1
# Three nets side by side: the third shows how far two layouts of stock PyTorch part by rounding alone.
_DEMO = {"model": "cifar-20", "data": "auto", "recipe": "demo", "compare": True, "yardstick": True, "eval_every": 60}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags; one that is not given is absent from the result, so that --resume can tell."""
    from ..train.data import NAMES
    from ..train.ranks import TIMEOUT
    from ..train.recipes import RECIPES

    def add(flag: str, text: str, **options: Any) -> None:
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)

    recipes = "; ".join(f"{name}: {recipe.summary}" for name, recipe in RECIPES.items())
    add("--model", f"{MODEL_HELP} (default: cifar-20)")
    add("--data", f"one of {', '.join(NAMES)} (default: auto, Fashion-MNIST if it can be had, else digits)")
    add("--data-root", "where Fashion-MNIST is looked for first, and downloaded to", metavar="DIR")
    add("--image-size", "resize images to this many pixels", type=int, metavar="N")
    add("--validation", "evaluate on N held-out training images, not on the test images", type=int, metavar="N")
    add("--depth", "layers: --model cifar (the default), plain or resnet, of this depth", type=int, metavar="N")
    add("--recipe", f"{recipes} (default: quick)", metavar="NAME")
    add("--epochs", "length of the run in epochs", type=int, metavar="N")
    add("--iterations", "length of the run in steps; the schedule scales with it", type=int, metavar="N")
    add("--batch-size", "images per step, of all ranks together", type=int, metavar="N")
    add("--lr", "peak learning rate", type=float)
    add("--compare", "train the stock twin alongside and compare", action="store_true")
    add("--yardstick", "with a third net: stock in the other memory format, which parts too", action="store_true")
    add("--amp", "mixed precision: off, bf16 or fp16 (default: off)", choices=("off", "bf16", "fp16"))
    add("--memory", "what the fused blocks keep for backward (default: speed)", choices=MEMORY_MODES)
    add("--channels-last", "memory format of all lanes (default: on)", action=argparse.BooleanOptionalAction)
    add("--threads", "CPU threads (default: torch's choice)", type=int, metavar="N")
    add("--seed", "of the parameters and the batches (default: 0)", type=int)
    add("--device", "default: the accelerator if there is one, else cpu; under torchrun cuda is the local rank's GPU")
    add(
        "--sync-bn",
        "on several ranks: batch norm by the whole batch, else by each rank's part, and rank 0's running statistics "
        "(default: on)",
        action=argparse.BooleanOptionalAction,
    )
    add("--timeout", f"seconds that a rank waits for another (default: {TIMEOUT:.0f})", type=float, metavar="S")
    add("--eval-every", "steps between evaluations (default: a tenth of the run)", type=int, metavar="N")
    add("--checkpoint-every", "steps between checkpoints (default: a tenth of the run)", type=int, metavar="N")
    parser.add_argument("--out", help="folder for the run (default: a new one under runs)", metavar="DIR")
    parser.add_argument(
        "--resume",
        help="go on from this checkpoint, or from this run's folder; auto: from --out if it holds a run, else start",
        metavar="PATH",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="a few minutes on two cores: cifar-20 with --compare and --yardstick on Fashion-MNIST, or digits. "
        "Option A shortcuts: what the paper uses on small images, without a parameter of their own",
    )


def run(args: argparse.Namespace) -> int:
    """Train, and report; on several ranks the first one does the talking."""
    from ..train import ranks as processes
    from ..train.errors import UserError

    begun: list[Any] = []
    try:
        device = getattr(args, "device", _default_device())
        with processes.joined(device, getattr(args, "timeout", processes.TIMEOUT)) as ranks:
            begun.append(_begin(args, ranks))
            return _train(begun[0], ranks)
    except processes.FailedElsewhereError:
        return UserError.exit_code
    except processes.LostRankError as error:
        saved = begun[0].checkpoint if begun else None
        hint = f"; to go on: {_command(True)} --resume {begun[0].out}" if saved and saved.exists() else ""
        print(f"resnet-fused: error: {error}{hint}", file=sys.stderr)
        return _LOST


def _command(several: bool) -> str:
    return "torchrun ... -m resnet_fused train" if several else "resnet-fused train"


def _begin(args: argparse.Namespace, ranks: Any) -> Any:
    """The run that the arguments ask for, new or continued, on every rank."""
    from ..train import Trainer, UserError, checkpoint

    going_on = args.resume
    if args.resume == _AUTO:
        if args.out is None:
            raise UserError("train: --resume auto: expected --out too, the run's folder")
        going_on = args.out if ranks.from_first(lambda: (Path(args.out) / checkpoint.NAME).exists()) else None
    config, dataset, out, state = _resumed(args, going_on, ranks) if going_on else _fresh(args, ranks)
    return ranks.together(lambda: Trainer(config, dataset, out, state, ranks))


def _train(trainer: Any, ranks: Any) -> int:
    from ..train import Stop
    from ..train.progress import Progress

    config, several = trainer.config, ranks.size > 1
    stream = sys.stdout if ranks.first else io.StringIO()
    names = " beside ".join(lane.name for lane in trainer.lanes)
    where = f"{config.device}{f', {ranks.size} ranks' if several else ''}"

    def say(line: str) -> None:
        print(line, file=stream)

    say(f"{config.model}: {names}, {config.iterations} iterations of {config.batch_size} images, {where}")
    say(f"data: {trainer.dataset.name} ({trainer.dataset.source})")
    if trainer.stands_in and len(trainer.lanes) > 1:
        say("stock: torch's SyncBatchNorm refuses the CPU; the same in plain PyTorch stands in, speeds do not compare")
    try:
        with Stop().listening() as stop, Progress(config.iterations, trainer.iteration, stream) as progress:
            complete = trainer.run(progress, stop)
        if not complete:
            say(f"stopped after {trainer.iteration} of {config.iterations} iterations, saved {trainer.checkpoint}")
            say(f"to go on: {_command(several)} --resume {trainer.out}")
            return 128 + stop.signal
        lines, picture = trainer.finish()
    finally:
        trainer.close()
    say("\n".join(lines))
    say(f"{'checkpoint':<20}{trainer.checkpoint}")
    say(f"{'curves':<20}{picture or 'not drawn: matplotlib is not installed'}")
    return 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line."""
    import dataclasses

    from ..train import TrainConfig

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in names} | _named_by_depth(args)


def _named_by_depth(args: argparse.Namespace) -> dict[str, str]:
    """The model that ``--depth`` names, and the recipe that so many layers need."""
    from ..train import UserError
    from ..train.recipes import DEEP, IMAGENET

    if not hasattr(args, "depth"):
        return {}
    recipe = getattr(args, "recipe", "")
    family = getattr(args, "model", "resnet" if recipe in IMAGENET else "cifar")
    if family not in ("cifar", "plain", "resnet"):
        raise UserError(f"train: --depth: expected --model cifar, plain or resnet with it, got {family!r}")
    named = {"model": f"{family}{'' if family == 'resnet' else '-'}{args.depth}"}
    return {**named, "recipe": DEEP[recipe]} if recipe in DEEP and args.depth >= 110 else named


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _fresh(args: argparse.Namespace, ranks: Any) -> Any:
    from ..train import TrainConfig, UserError, check_fits, complete
    from ..train.data import load

    settings = {"device": _default_device(), **(_DEMO if args.demo else {}), **_given(args)}
    config = TrainConfig(**settings)
    ranks.together(lambda: check_fits(config))
    out = ranks.from_first(lambda: _new_folder(args.out, config.model))
    dataset = ranks.one_by_one(lambda: load(config.data, config.data_root, config.image_size))
    config, fingerprint = ranks.from_first(lambda: (complete(config, dataset), dataset.fingerprint))

    def compare() -> None:
        if dataset.fingerprint != fingerprint:
            raise UserError(f"train: --data: rank {ranks.rank} found {dataset.fingerprint}; rank 0 {fingerprint}")

    ranks.together(compare)
    return config, dataset, out, None


def _resumed(args: argparse.Namespace, path: str, ranks: Any) -> Any:
    import dataclasses

    from ..train import TrainConfig, check_fits, checkpoint
    from ..train.data import load

    state = ranks.from_first(lambda: checkpoint.load(Path(path)))
    ran = ranks.together(lambda: TrainConfig.from_dict(state["config"]))
    auto, given = args.resume == _AUTO, _given(args)
    if not auto:
        _refuse_changes([n for n, v in given.items() if v != getattr(ran, n)] + ["demo"] * args.demo)
    free = {name: value for name, value in given.items() if name in _FREE_ON_RESUME}
    config = dataclasses.replace(ran, **free)
    if ranks.size > 1:
        config = dataclasses.replace(config, device=config.device.partition(":")[0])
    ranks.together(lambda: check_fits(config))
    dataset = ranks.one_by_one(lambda: load(config.data, config.data_root, config.image_size))
    if auto:
        ranks.together(lambda: _refuse_changes(_changed({**(_DEMO if args.demo else {}), **given}, ran, dataset)))
    out = ranks.from_first(lambda: _writable(Path(args.out) if args.out else checkpoint.locate(Path(path)).parent))
    return config, dataset, out, state


def _refuse_changes(names: list[str]) -> None:
    from ..train import UserError

    flags = ", ".join(f"--{name.replace('_', '-')}" for name in names if name not in _FREE_ON_RESUME)
    if flags:
        raise UserError(f"train: --resume takes the run's own settings; it does not go with {flags}")


def _changed(given: dict[str, Any], ran: Any, dataset: Any) -> list[str]:
    """The settings of a command that started a run by other values than a checkpoint has."""
    from ..train import TrainConfig, complete

    names = set(given) - ({"data"} if given.get("data") == "auto" else set())
    whole = complete(TrainConfig(**{**given, "data": given.get("data", ran.data)}), dataset)
    meant = {name: given[name] if name == "data" else getattr(whole, name) for name in names}
    changed = [name for name, value in meant.items() if value != getattr(ran, name)]
    return sorted(changed + ["epochs"] * (given.get("epochs", 0) > 0 and whole.iterations != ran.iterations))


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
