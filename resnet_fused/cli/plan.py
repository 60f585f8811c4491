"""What a training step moves, keeps and at least takes, before and after fusing: for any batch, and with no GPU.

For the stock model, torch.compile and each memory mode, layer by layer and in total: bytes read and written, bytes
kept for the backward, kernel launches, the largest batch that fits the device, and a floor of the time. Everything is
counted on the meta device, but torch.compile's line and the times, which are modelled: a kernel takes no less than its
bytes by the device's bandwidth, nor less than its FLOPs by the device's rate.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from ._console import print_table, write_json

HELP = "bytes, memory, launches and a floor of the time of a step, stock, compiled and fused, per layer"
_MB, _DTYPES = 1e6, ("bf16", "fp16", "fp32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    from ..devices import NAMES

    parser.add_argument("model", help="a builder's name (resnet50, cifar-20, ...), torchvision:NAME or module:function")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="images (default: 256)")
    parser.add_argument(
        "--image", type=int, metavar="N", help="pixels (default: 32 for a network made for CIFAR, else 224)"
    )
    parser.add_argument("--amp", choices=_DTYPES[:2], help="autocast's dtype (default: none)")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the model without --amp (default: fp32)")
    parser.add_argument("--device", metavar="NAME", help=f"{', '.join(NAMES)} (default: this machine's GPU, or h100)")
    parser.add_argument("--total", action="store_true", help="print no layers")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")


def run(args: argparse.Namespace) -> int:
    """Count, model, print."""
    from ..costs import state_bytes, step_costs
    from ..counting import DTYPES, meta_images
    from ..train.errors import UserError
    from ..train.models import build_model, input_channels

    model = build_model(args.model)
    image = args.image if args.image is not None else _pixels(model)
    for name, value in (("batch", args.batch), ("image", image)):
        if value < 1:
            raise UserError(f"plan: --{name}: expected at least 1, got {value}")
    dtype = DTYPES[args.amp or args.dtype]
    try:
        device, rate = _device(args.device, dtype)
        images = meta_images(args.batch, image, dtype, input_channels(model))
        costs = step_costs(model, images, args.amp is not None)
        state = state_bytes(model.to(dtype), args.amp is not None)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"plan: {args.model}: {str(error).strip().splitlines()[0]}") from error
    per_image = images[0].numel() * images.element_size()
    totals = [_total(cost, device, rate, state, per_image) for cost in costs.values()]
    layers = {name: [_layer(layer, device, rate) for layer in cost.layers] for name, cost in costs.items()}
    what = {"model": args.model, "image": image, "batch": args.batch, "dtype": args.amp or args.dtype}
    if args.json:
        write_json(
            args.json, {**what, "device": dataclasses.asdict(device), "totals": totals, "layers": layers}, "plan"
        )
    precision = f"autocast {args.amp}" if args.amp else args.dtype
    print(f"{args.model}, {image} px, batch {args.batch}, {precision}, on {device.name} ({device.source})\n")
    if not args.total:
        _print_layers(layers, args.batch)
    _print_totals(totals, args.batch)
    return 0


def _pixels(model: Any) -> int:
    """The images a network is made for: a first convolution of 3x3 that does not step is one for CIFAR's."""
    from torch import nn

    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    small = first is not None and first.kernel_size == (3, 3) and first.stride == (1, 1)
    return 32 if small else 224


def _device(name: str | None, dtype: Any) -> tuple[Any, str]:
    """The device, and the precision whose rate counts there."""
    from .. import devices
    from ..costs import rate_name

    device = devices.named(name) if name else devices.here() or devices.DEVICES["h100"]
    rate = rate_name(dtype)
    if rate == "tf32" and rate not in device.flops:
        rate = "fp32"
    device.seconds(0, 0, rate)
    return device, rate


def _total(cost: Any, device: Any, rate: str, state: float, image: int) -> dict[str, Any]:
    seconds = cost.seconds(device, rate)
    return {
        "scheme": cost.scheme,
        "basis": cost.basis,
        "forward": sum(work.moved for layer in cost.layers for work in layer.forward),
        "backward": sum(work.moved for layer in cost.layers for work in layer.backward),
        "moved": cost.moved,
        "kept": cost.kept,
        "flops": sum(layer.flops for layer in cost.layers),
        "launches": cost.launches,
        "largest_batch": cost.largest_batch(device, state, image),
        "floor_s": seconds,
    }


def _layer(layer: Any, device: Any, rate: str) -> dict[str, Any]:
    numbers = {name: getattr(layer, name) for name in ("name", "moved", "kept", "flops", "launches")}
    return {**numbers, "floor_s": layer.seconds(device, rate)}


def _print_layers(layers: dict[str, list[dict[str, Any]]], batch: int) -> None:
    """Per layer the five schemes side by side, a table for each quantity that differs between them."""
    schemes = {name: {line["name"]: line for line in lines} for name, lines in layers.items()}
    names = list(next(iter(schemes.values())))
    columns = ["layer", "GFLOP"]
    columns += [f"{what} {name}" for what in ("MB", "kept", "us") for name in schemes]
    rows = []
    for name in names:
        found = [lines.get(name) for lines in schemes.values()]
        stock = found[0]
        row = [name or "-", f"{stock['flops'] / batch / 1e9:.2f}" if stock else "-"]
        for what, unit in (("moved", batch * _MB), ("kept", batch * _MB), ("floor_s", batch * 1e-6)):
            row += ["-" if line is None else f"{line[what] / unit:.2f}" for line in found]
        rows.append(row)
    print("per image: MB read and written, MB kept for the backward, modelled floor in microseconds\n")
    print_table(columns, rows)
    print()


def _print_totals(totals: list[dict[str, Any]], batch: int) -> None:
    columns = (
        *("per image", "basis", "MB forward", "MB backward", "MB kept", "GFLOP", "launches", "largest batch"),
        *("floor ms per step", "floor images/s"),
    )
    rows = []
    for line in totals:
        megabytes = [f"{line[name] / batch / _MB:.1f}" for name in ("forward", "backward", "kept")]
        counts = [str(line["launches"]), str(line["largest_batch"])]
        time = [f"{line['floor_s'] * 1e3:.2f}", f"{batch / line['floor_s']:,.0f}"]
        rows.append([line["scheme"], line["basis"], *megabytes, f"{line['flops'] / batch / 1e9:.1f}", *counts, *time])
    print_table(columns, rows)
    print(
        "\nlaunches: kernels of ours, and operators that start at least one kernel each. Largest batch: parameters,"
        "\ntheir momentum and 1 GiB for the device's context set apart. Floor: modelled, kernel by kernel, from peak"
        "\nbandwidth and peak FLOP rate; no device reaches it. Not counted: the loss, the optimizer, autocast's casts."
    )
