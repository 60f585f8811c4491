"""Count the bytes that one training step moves, per image, and hold them against the bound.

The fused network runs on the meta device at full size: every kernel launch is noted with the tensors it
names, and every ATen operator between them; nothing is allocated, nothing runs. Beside them, by the table of
passes per site (`resnet_fused.passes`) over the network's own sites: eager PyTorch, torch.compile (Inductor) and
NVIDIA's MLPerf chain. Exit code 1 when the activations of an extent are over its bound, or weights and
partials together over theirs (10 MB, from batch 256 on).
"""

from __future__ import annotations

import argparse
from typing import Any

from ._console import print_table, write_json

HELP = "bytes per image of a training step, counted from the launches, beside other schemes"
_DTYPES = ("bf16", "fp16", "fp32")
_EXTENTS = ("trunk", "stage", "block")
_SCHEMES = {
    "eager": "eager PyTorch",
    "inductor": "torch.compile (Inductor)",
    "mlperf": "NVIDIA's MLPerf chain",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("model", help="a residual network's builder: resnet50, resnet18, cifar-20, ...")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="images (default: 256)")
    parser.add_argument("--image", type=int, default=224, metavar="N", help="pixels (default: 224)")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--extent", choices=_EXTENTS, help="where chains end (default: all three)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")


def run(args: argparse.Namespace) -> int:
    """Count, print; 0 within the bounds, 1 over one."""
    from ..traffic import DTYPES, compare, count_passes
    from ..train.errors import UserError

    for name in ("batch", "image"):
        if getattr(args, name) < 1:
            raise UserError(f"traffic: --{name}: expected at least 1, got {getattr(args, name)}")
    extents = (args.extent,) if args.extent else _EXTENTS
    try:
        found = compare(args.model, args.batch, args.image, args.dtype, extents)
        found["passes"] = {e: count_passes(e, dtype=DTYPES[args.dtype])._asdict() for e in extents}
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"traffic: {args.model}: {str(error).strip().splitlines()[0]}") from error
    if args.json:
        write_json(args.json, found, "traffic")
    _print(args, found)
    return 1 if any(line["over"] for line in found["extents"].values()) else 0


def _print(args: argparse.Namespace, found: dict[str, Any]) -> None:
    print(f"{args.model}, {args.image} px, batch {args.batch}, {args.dtype}: MB per image of one training step\n")
    columns = (
        *("counted", "forward", "backward", "activations", "bound", "of them by ATen", "weights", "partials"),
        *("launches", "operators"),
    )
    rows = []
    for extent, line in found["extents"].items():
        numbers = [f"{line[name]:.1f}" for name in ("forward", "backward", "activations")]
        rest = [f"{line[name]:.1f}" for name in ("by_operators", "weights", "partials")]
        counts = [str(line["launches"]), str(line["operators"])]
        over = " OVER" if line["over"] else ""
        rows.append([f"ours, extent {extent}", *numbers, f"{line['bound']}{over}", *rest, *counts])
    line = found["eager"]
    numbers = [f"{line[name]:.1f}" for name in ("forward", "backward", "activations")]
    rest = [f"{line[name]:.1f}" for name in ("by_operators", "weights", "partials")]
    rows.append(["eager, best case", *numbers, "", *rest, "0", str(line["operators"])])
    print_table(columns, rows)
    print()
    rows = []
    for scheme, words in _SCHEMES.items():
        line = found["schemes"][scheme]
        rows.append([words, *(f"{line[name]:.1f}" for name in ("forward", "backward", "activations"))])
    print_table(("by the table of passes", "forward", "backward", "activations"), rows)
    print()
    _print_passes(found)


def _print_passes(found: dict[str, Any]) -> None:
    def words(passes: Any) -> str:
        return " / ".join(f"{value:g}" for value in passes)

    rows = [
        [f"ours, extent {extent}, counted", words(line["relu"]), words(line["add"])]
        for extent, line in found["passes"].items()
    ]
    for scheme, name in _SCHEMES.items():
        line = found["schemes"][scheme]["passes"]
        rows.append([name, words(line["relu"]), words(line["add"])])
    print_table(("passes, forward / backward, at a bottleneck's inner site", "conv-BN-ReLU", "conv-BN-add-ReLU"), rows)
    print(
        "\nlaunches: our kernels; operators: ATen calls that start at least one kernel (no views, no allocations)."
        "\nCounted once per kernel: every tensor it names. Not counted: the loss and the optimizer."
    )
