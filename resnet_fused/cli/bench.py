"""Time fused networks against others, after a proof that the fused ones are right.

For every network: first `resnet-fused check`'s law at the image size and dtype asked for, on at most 8 images (one
that breaks it is not timed, and the exit code is 1), then all contestants in turns, one step each per round, the
starter changing from round to round. The ratio is the median over the rounds of theirs over ours; its interval is by
order statistics, at least 95 %, and assumes no distribution. A step is forward with cross-entropy, backward, and SGD
with momentum, each timed; all contestants take the same steps on the same batches, so their losses can be compared at
the end. Peak memory is the most that one step allocates at once above parameters, momentum and input; kept is what
its forward keeps for its backward. Ctrl-C keeps what is finished.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._console import MEMORY_MODES, MODEL_HELP, print_table

if TYPE_CHECKING:
    from ..benching.session import Settings

HELP = "time fused networks against eager PyTorch and torch.compile, in turns"
_BASELINES = ("eager", "nhwc", "compile", "max-autotune", "compile-graphs", "apex", "inplace-abn")
_DTYPES = ("fp32", "bf16", "fp16")
_AMP = ("off", "bf16", "fp16")
_MODES = ("train", "infer")


def _list(text: str) -> tuple[str, ...]:
    """Comma-separated names, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""

    def add(flag: str, default: Any, text: str, **options: Any) -> None:
        shown = ",".join(default) if isinstance(default, tuple) else default
        options.setdefault("type", _list if isinstance(default, tuple) else type(default))
        parser.add_argument(flag, default=default, help=f"{text} (default: {shown})", **options)

    add("--models", ("resnet18", "resnet50"), f"some of: {MODEL_HELP}", metavar="NAMES")
    add("--baselines", ("eager", "nhwc", "compile"), f"some of {','.join(_BASELINES)}", metavar="NAMES")
    add("--batch", 8, "images", metavar="N")
    add("--image", 224, "pixels", metavar="N")
    add("--dtype", "fp32", "of parameters and images", choices=_DTYPES)
    add("--amp", "off", "autocast to this dtype", choices=_AMP)
    add(
        "--memory",
        ("speed",),
        f"what fused networks keep for backward: some of {','.join(MEMORY_MODES)}",
        metavar="NAMES",
    )
    add("--mode", ("train",), f"some of {','.join(_MODES)}", metavar="NAMES")
    add("--rounds", 11, "timed steps of every contestant; six or more give an interval of 95 %%", metavar="N")
    add("--warm-up", 2, "untimed steps before them", metavar="N")
    add("--threads", 0, "CPU threads; 0 is torch's choice", metavar="N")
    add("--seed", 0, "of parameters, images and labels")
    add("--device", "cpu", "cpu or cuda")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything there as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there as PNG; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    """Check the input, prove, time, print, write; 0, 1 when a network was not right, 130 after Ctrl-C."""
    import torch

    from ..benching.files import write_atomically, write_json
    from ..benching.session import Session
    from ..train.progress import Progress

    settings = _settings(args)
    _check_files(args)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    _check_fits(settings)
    done = 0
    with Progress(settings.steps(), stream=sys.stderr) as progress:

        def advance() -> None:
            nonlocal done
            done += 1
            progress.update(done, "rounds")

        session = Session(settings, progress.say, advance)
        session.run()
    document = session.document(_command(args))
    if args.out:
        write_json(args.out, document)
    if args.plot:
        from ..benching.plot import draw

        write_atomically(args.plot, draw(document))
    _print(document)
    if session.interrupted:
        raise KeyboardInterrupt
    return session.exit_code()


def _print(document: dict[str, Any]) -> None:
    from ..benching import report

    print("\n".join([report.setting_line(document), report.machine_line(document), *report.failures(document)]))
    for columns, rows in report.tables(document):
        print()
        print_table(columns, rows)
    between = [result["losses"]["between_eager_formats"] for result in document["results"] if result["losses"]]
    if any(distance is not None for distance in between):
        print("\neager channels_last is eager too: its distance to eager NCHW is what rounding alone comes to")


def _settings(args: argparse.Namespace) -> Settings:
    import dataclasses

    from ..benching.session import Settings
    from ..train.errors import UserError

    for name, least in (("batch", 1), ("image", 1), ("rounds", 1), ("warm_up", 0), ("threads", 0)):
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"bench: --{flag}: expected at least {least}, got {getattr(args, name)}")
    for name, known in (("baselines", _BASELINES), ("memory", MEMORY_MODES), ("mode", _MODES)):
        if unknown := [value for value in getattr(args, name) if value not in known]:
            raise UserError(f"bench: --{name}: expected some of {','.join(known)}; got {','.join(unknown)!r}")
    if args.amp != "off" and args.dtype != "fp32":
        raise UserError(f"bench: --amp {args.amp}: expected --dtype fp32 beside it, got {args.dtype}")
    return Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})


def _check_files(args: argparse.Namespace) -> None:
    from ..benching.files import check_writable
    from ..train.errors import UserError

    if args.out:
        check_writable(args.out, "--out")
    if args.plot:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("bench: --plot: matplotlib is not installed")
        check_writable(args.plot, "--plot")


def _check_fits(settings: Settings) -> None:
    """Device, dtype, baselines and networks, before anything is measured."""
    import torch

    from ..benching.baselines import BASELINES
    from ..train.errors import UserError
    from ..train.models import build_model

    try:
        torch.empty(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"bench: --device: cannot use {settings.device!r}: {reason}") from error
    where = settings.setting()
    if where.device.type not in ("cpu", "cuda"):
        raise UserError(f"bench: --device: expected cpu or cuda, got {settings.device!r}")
    flag = "--dtype" if settings.amp == "off" else "--amp"
    if obstacle := _dtype_obstacle(where.device, where.kind):
        raise UserError(f"bench: {flag}: {where.kind} does not run on {where.device}: {obstacle}")
    for name in settings.baselines:
        if obstacle := BASELINES[name].obstacle(where):
            raise UserError(f"bench: --baselines: {name}: {obstacle}")
    for name in settings.models:
        try:
            model = build_model(name)
        except UserError as error:
            raise UserError(f"bench: {str(error).replace('--model', '--models', 1)}") from error
        _check_size(name, model, settings)


def _dtype_obstacle(device: Any, dtype: Any) -> str | None:
    """Why a convolution with its backward does not run in a dtype, or None."""
    import torch

    x = torch.ones(1, 8, 4, 4, device=device, dtype=dtype, requires_grad=True)
    try:
        torch.conv2d(x, torch.ones(8, 8, 1, 1, device=device, dtype=dtype)).sum().backward()
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return None


def _check_size(name: str, model: Any, settings: Settings) -> None:
    """Run it once, on two images at most: an image can be too small for a network."""
    import torch

    from ..train.errors import UserError
    from ..train.models import input_channels

    shape = (min(settings.batch, 2), input_channels(model), settings.image, settings.image)
    try:
        with torch.no_grad():
            out = model.train()(torch.zeros(shape))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"bench: --models: {name} does not take images of shape {shape}: {reason}") from error
    if not isinstance(out, torch.Tensor) or out.dim() != 2:
        raise UserError(f"bench: --models: {name}: expected a classifier with an output (N, classes)")


def _command(args: argparse.Namespace) -> str:
    """The command line with every setting, defaults included, and paths cut down to their last part."""
    words = ["resnet-fused", "bench"]
    for name, value in vars(args).items():
        if name in ("command", "run") or value is None:
            continue
        shown = ",".join(value) if isinstance(value, tuple) else value.name if isinstance(value, Path) else str(value)
        words += [f"--{name.replace('_', '-')}", shown]
    return " ".join(words)
