"""`convert`: a residual net's state dict from any format to any other."""

from __future__ import annotations

import warnings as python_warnings
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .checks import unusual
from .formats import Format, find_format
from .holding import DROPPABLE, fit
from .options import ConvertOptions
from .reading import Reading, detect, read, shown
from .report import Conversion
from .roles import COUNTER, ConversionError, Net, Role
from .wrappers import unwrap
from .writing import choose, in_order, spell


@overload
def convert(
    state_dict: Mapping[str, Any],
    src: str | None = None,
    dst: str = "torchvision",
    *,
    return_report: Literal[False] = False,
    **options: Unpack[ConvertOptions],
) -> dict[str, Tensor]: ...


@overload
def convert(
    state_dict: Mapping[str, Any],
    src: str | None = None,
    dst: str = "torchvision",
    *,
    return_report: Literal[True],
    **options: Unpack[ConvertOptions],
) -> tuple[dict[str, Tensor], Conversion]: ...


def convert(
    state_dict: Mapping[str, Any],
    src: str | None = None,
    dst: str = "torchvision",
    *,
    return_report: bool = False,
    **options: Unpack[ConvertOptions],
) -> dict[str, Tensor] | tuple[dict[str, Tensor], Conversion]:
    """Give every tensor of a residual net the key that it has in another code base.

    The values are the same tensor objects, of any dtype and device; only batch counters that the source lacks are
    new (int64, zero). The order is that of the destination model's own state dict. Basic and bottleneck nets of any
    depth and width. What a state dict does not say (strides, padding, the stem's ReLU and pool) is the model's; the
    report warns where the models of the two formats differ in it.

    Args:
        state_dict: tensors by name, or a checkpoint that holds them under ``state_dict``, ``model`` and the like.
            Prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``) are taken off.
        src: the format it is in, one of `FORMATS` or `ALIASES`; None finds out.
        dst: the format to write.
        return_report: also return a `Conversion`, which prints.
        **options: see `ConvertOptions`.

    Raises:
        ConversionError: (a ValueError) an unknown format; no format reads the source, or several do and disagree;
            keys of unknown meaning; a net that is not whole; tensors that the destination has no place for and that
            ``drop`` does not name.
    """
    out, report = translate(state_dict, src, dst, options)
    if report.unknown:
        python_warnings.warn(f"convert: left out, of unknown meaning: {shown(report.unknown)}", stacklevel=2)
    return (out, report) if return_report else out


def translate(
    state_dict: Mapping[str, Any], src: str | None, dst: str, options: ConvertOptions
) -> tuple[dict[str, Tensor], Conversion]:
    """What `convert` does, without its warning."""
    target, source = find_format(dst, "dst"), None if src is None else find_format(src, "src")
    drop = options.get("drop", ())
    drop = (drop,) if isinstance(drop, str) else tuple(drop)
    strict, sizes = options.get("strict", True), options.get("stages")
    patterns = [word for word in drop if word not in DROPPABLE]
    given = unwrap(state_dict, options.get("entry"), options.get("src_prefix", ""), patterns)
    if source is None:
        reading, also = detect(given.tensors, strict, sizes)
    elif sizes is None or source.flat:
        reading, also = read(given.tensors, source, sizes), []
    else:
        raise ConversionError(f"convert: stages: expected None, as {source.name} names its stages, got {sizes}")
    unknown = tuple(given.original[key] for key in reading.unknown) + given.foreign
    _refuse(reading, unknown, strict)

    counters = options.get("num_batches_tracked")
    counters = target.counters if counters is None else counters
    net, dropped = fit(reading.net, target, drop, counters)
    whole = _with_counters(net) if counters and COUNTER not in drop else net
    keys = _keys(whole, target, options.get("dst_prefix"))
    source_key = {role: given.original[key] for key, role in reading.roles.items()}
    report = Conversion(
        src=reading.format.name,
        dst=target.name,
        also=tuple(also),
        stages=reading.net.stages,
        keys={key: keys[role] for role, key in source_key.items() if role in net.tensors},
        created=tuple(key for role, key in keys.items() if role not in net.tensors),
        dropped={**given.dropped, **{source_key[role]: reason for role, reason in dropped.items()}},
        unknown=unknown,
        wrappers=given.taken_off,
        warnings=tuple(_warnings(reading, net, target)),
        notes=(*given.notes, *reading.problems),
    )
    return {key: whole.tensors[role] for role, key in keys.items()}, report


def _refuse(reading: Reading, unknown: tuple[str, ...], strict: bool) -> None:
    """Raise unless everything was read and the net is whole; what is not strict wants a block at least."""
    name = reading.format.name
    if not reading.net.blocks:
        raise ConversionError(f"convert: src: {name} reads no block of it; it has {shown(unknown) or 'no keys'}")
    if strict and unknown:
        raise ConversionError(
            f"convert: src: {name} has no meaning for {len(unknown)} keys: {shown(unknown)}; "
            "name them in drop, or give strict=False, to leave them out"
        )
    if strict and reading.problems:
        raise ConversionError(
            f"convert: src: not a whole net in {name}: {shown(reading.problems)}; strict=False takes it as it is"
        )


def _with_counters(net: Net) -> Net:
    """The net with a batch counter wherever there are running statistics."""
    made = {
        role._replace(leaf=COUNTER): mean.new_zeros((), dtype=torch.int64)
        for role, mean in net.tensors.items()
        if role.leaf == "running_mean"
    }
    return Net({**made, **net.tensors}, net.averages)


def _keys(net: Net, target: Format, prefix: str | None) -> dict[Role, str]:
    """Every role's key, in the order of the target's own state dict."""
    layout, stem = choose(net, target)
    keys = {}
    for role in in_order(net, target, stem):
        key = spell(role, target, layout, stem, net)
        assert key is not None, f"{role} has no place in {target.name} and was let through"
        if prefix is not None and key.startswith(layout.prefix):  # a head beside the backbone has no prefix
            key = prefix + key[len(layout.prefix) :]
        keys[role] = key
    return keys


def _warnings(reading: Reading, net: Net, target: Format) -> list[str]:
    """In what the two formats' models differ beyond their keys."""
    source, found = reading.format, unusual(net, target)
    strides = {source.stride_in, target.stride_in} - {None}
    if 3 in net.convolutions.values() and len(strides) == 2:
        found.append(
            f"{source.name}'s bottlenecks stride in their {source.stride_in} convolution, {target.name}'s in their "
            f"{target.stride_in}; no state dict says which: build the destination to stride as the source does"
        )
    if reading.net.averages and not net.averages:
        found.append("the shortcuts' average pools are left out: the destination computes something else")
    if source.channel_order != target.channel_order:
        found.append(
            f"weights published in {source.name} expect {source.channel_order} images, those in {target.name} "
            f"{target.channel_order}: feed the converted net as the source was fed"
        )
    if source.stem and target.stem and source.stem != target.stem and net.where("stem"):
        found.append(
            f"in the stem {source.name}'s own models have {source.stem}, {target.name}'s {target.stem}: "
            "build the destination like the source"
        )
    return found
