"""Measure what may run at every site of a model on this machine, and keep the winners.

Each candidate is held to the numerics law first, then timed beside the others in turns. It replaces the
rules' choice only when it is clearly faster, and the whole training step has the last word. Later
processes on this device, with the same versions, use what is kept; RESNET_FUSED_TUNE=0 turns that off.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ._console import MEMORY_MODES, add_model, print_table, write_json

HELP = "measure the candidates at every site on this device, and keep the winners"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add_model(parser, "resnet50")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images (default: 8)")
    parser.add_argument("--image", type=int, default=224, metavar="N", help="pixels (default: 224)")
    parser.add_argument("--dtype", default="fp32", help="fp32, fp64, bf16, fp16, amp-bf16 or amp-fp16 (default: fp32)")
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--time", type=float, default=60.0, metavar="S", help="seconds at most (default: 60)")
    parser.add_argument("--cache", metavar="DIR", help="folder to keep the winners in (default: the user's cache)")
    parser.add_argument("--memory", choices=MEMORY_MODES, default="speed", help="default: speed")
    parser.add_argument("--json", metavar="FILE", help="write the report there")


def run(args: argparse.Namespace) -> int:
    """Measure, print; 0, or 130 when Ctrl-C ended it early."""
    import torch

    from ..checking import DTYPES
    from ..train.errors import UserError
    from ..train.models import build_model, input_channels
    from ..tuning import tune

    device = _checked(args, tuple(DTYPES))
    kind, amp = DTYPES[args.dtype]
    model = build_model(args.model)
    channels = input_channels(model)
    own = torch.float32 if amp else kind
    try:
        model = model.to(device, own, memory_format=torch.channels_last)  # type: ignore[call-overload]
        sample = torch.randn(args.batch, channels, args.image, args.image).to(
            device, own, memory_format=torch.channels_last
        )
        bar = _Bar()
        with bar, torch.autocast(device.type, kind, enabled=amp):
            report = tune(
                model, sample, memory=args.memory, time_limit=args.time, cache_dir=args.cache, progress=bar.update
            )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"tune: {args.model}: {(str(error).strip().splitlines() or [repr(error)])[0]}") from error
    if args.json:
        write_json(args.json, report.as_dict(), "tune")
    _print(report)
    return 130 if report.interrupted else 0


def _checked(args: argparse.Namespace, dtypes: tuple[str, ...]) -> Any:
    """The device; every argument that can be judged is judged before anything is built or measured."""
    import torch

    from ..train.errors import UserError
    from ..winners import store

    for name in ("batch", "image"):
        if getattr(args, name) < 1:
            raise UserError(f"tune: --{name}: expected at least 1, got {getattr(args, name)}")
    if args.dtype not in dtypes:
        raise UserError(f"tune: --dtype: expected one of {', '.join(dtypes)}; got {args.dtype!r}")
    if not 0 < args.time < float("inf"):
        raise UserError(f"tune: --time: expected seconds above 0, got {args.time:g}")
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"tune: --device: expected cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"tune: --device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"tune: --device: expected a device of this machine, got {name!r}: torch sees no such GPU")
    try:
        store.check_writable(store.folder(args.cache))
    except (store.StoreError, RuntimeError) as error:
        raise UserError(f"tune: --cache: {error}") from error
    return device


class _Bar:
    """The progress bar, which begins when the number of decisions is known."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def update(self, done: int, total: int, text: str) -> None:
        from ..train.progress import Progress

        if self._bar is None:
            self._bar = Progress(total, stream=sys.stderr).__enter__()
        self._bar.update(done, text)


def _print(report: Any) -> None:
    from ..tuning.report import COLUMNS

    if report.measured:
        print_table(COLUMNS, report.rows())
        print()
    print("\n".join(report.summary()))
