"""Steps to a chain: the match runs from the block's output backwards to its input.

Everything a chain could not reproduce is a `MismatchError`: a convolution used twice, a value read twice, a
shortcut whose channels or size would broadcast. A batch norm may be used several times.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, cast

from torch import nn

from .links import is_frozen_norm
from .spec import ChainSpec, PoolSpec, ShortcutSpec, SiteSpec
from .steps import Step, Steps

_SIZES = (32, 33)


class MismatchError(Exception):
    """The steps are not a chain; the message is the reason."""


def match(steps: Steps, module: nn.Module) -> ChainSpec:
    """The chain that ``steps`` of ``module`` are; ``inner`` is left empty.

    Raises:
        MismatchError: they are not one.
    """
    _check_reuse(steps)
    spec = _in_order(_read(steps.result, module), steps)
    padded = None
    if spec.shortcut.kind == "pad":
        padded = _conv(module, spec.sites[0]).in_channels
        for step in steps.reachable():
            padded = max(sum(step.channels) + padded, step.total or 0)
    check(spec, module, padded)
    return spec


def check(spec: ChainSpec, module: nn.Module, padded: int | None = None) -> None:
    """Whether the channels and sizes of a chain of ``module`` fit; ``padded``: the channels of option A's shortcut.

    Raises:
        MismatchError: they cannot run, or would broadcast.
    """
    _check_channels(spec, module, padded)
    _check_sizes(spec, module)


def _check_reuse(steps: Steps) -> None:
    for path, times in Counter(s.path for s in steps.all if s.kind == "conv").items():
        if times > 1:
            raise MismatchError(f"convolution '{path}' is used {times} times in one forward")
    for step in steps.all:
        if step.kind in ("bn", "relu") and step.inputs[0].kind == "input":
            raise MismatchError(f"pre-activation order: {step} reads the block's input")
    reachable = steps.reachable()
    for step in reversed(steps.all):
        if step not in reachable and step.kind not in ("input", "copy", "subsample", "pad"):
            raise MismatchError(f"the result of {step} is not used")
    for step, users in Counter(source for s in reachable for source in s.inputs).items():
        if users > 1 and step.kind != "input":
            raise MismatchError(f"the result of {step} is used {users} times")


def _read(step: Step, module: nn.Module) -> ChainSpec:
    pool: PoolSpec | None = None
    if step.kind == "pool":
        pool, step = step.pool, step.source()
        if step.kind != "relu":
            raise MismatchError(f"the max pool follows {step}, not a ReLU")
    relu = step.kind == "relu"
    if relu:
        step = step.source()
    post: str | None = None
    if step.kind == "bn":
        if step.source().kind != "add":
            return ChainSpec(_read_sites(step, relu), relu=relu, pool=pool)
        post, step = step.path, step.source()
    if step.kind != "add":
        raise MismatchError(_odd(step, "the ReLU" if relu else "the block's output"))
    if pool is not None:
        raise MismatchError("a max pool follows the shortcut's add")
    return dataclasses.replace(_match_add(step, module), relu=relu, post=post)


def _in_order(spec: ChainSpec, steps: Steps) -> ChainSpec:
    """The spec with its shared batch norms used in the order of the forward: the statistics move at every use."""
    shared = spec.shared_norms()
    traced = [(s.path, s.source().path) for s in steps.all if s.kind == "bn" and s.path in shared]
    for first in (False, True):
        ordered = dataclasses.replace(spec, shortcut=dataclasses.replace(spec.shortcut, first=first))
        if [use for use in ordered.uses() if use[0] in shared] == traced:
            return ordered
    raise MismatchError(
        f"the shortcut uses batch norm '{traced[0][0]}' between two convolutions of the main path that share it"
    )


def _odd(step: Step, reader: str) -> str:
    if step.kind == "conv":
        return f"{step} is followed by {reader}, not by a batch norm"
    return f"{reader} reads {step}, which is not the end of a conv-BN-ReLU chain"


def _match_add(add: Step, module: nn.Module) -> ChainSpec:
    first, second = add.source(0), add.source(1)
    lengths = _run_length(first), _run_length(second)
    if min(lengths) > 1:
        raise MismatchError(f"both operands of the add are chains, of {lengths[0]} and {lengths[1]} convolutions")
    main, other = (first, second) if lengths[0] >= lengths[1] else (second, first)
    if main.kind != "bn":
        operand = first if first.kind not in ("input", "copy", "subsample", "pad", "module") else second
        raise MismatchError(_odd(operand, "the add"))
    sites = _read_sites(main, False)
    shortcut = _read_shortcut(other)
    if add.inplace and main is not first:
        # in place keeps the left operand's dtype: that of the main path only if both end the same way
        ends = [module.get_submodule(step.path) for step in (main, other) if step.path]
        if len(ends) < 2 or len({type(m) if is_frozen_norm(m) else None for m in ends}) > 1:
            raise MismatchError("the add is in place on the shortcut, not on the main path")
    return ChainSpec(sites, shortcut, inplace_add=add.inplace)


def _run_length(step: Step) -> int:
    """How many conv-BN sites end at ``step``; 0 if it is not a batch norm."""
    length = 0
    while step.kind == "bn" and step.source().kind == "conv":
        length += 1
        step = step.source().source()
        if step.kind == "relu":
            step = step.source()
    return length


def _read_sites(step: Step, relu: bool) -> tuple[SiteSpec, ...]:
    """The sites that end at the batch norm ``step``, back to the block's input."""
    sites: list[SiteSpec] = []
    while True:
        conv = step.source()
        if conv.kind != "conv":
            raise MismatchError(f"{step} follows {conv}, not a convolution")
        sites.insert(0, SiteSpec(conv.path, step.path, relu))
        step = conv.source()
        if step.kind == "input":
            return tuple(sites)
        relu = step.kind == "relu"
        if relu:
            step = step.source()
        if step.kind != "bn":
            raise MismatchError(_odd(step, "a ReLU" if relu else str(conv)))


def _read_shortcut(step: Step) -> ShortcutSpec:
    if step.kind == "input":
        return ShortcutSpec("identity")
    if step.kind in ("subsample", "pad"):
        return _read_pad(step)
    if step.kind == "module" and step.source().kind == "input":
        return ShortcutSpec("module", path=step.path)
    bn = step.path if step.kind == "bn" else None
    conv = step.source() if bn is not None else step
    if conv.kind != "conv":
        raise MismatchError(f"the shortcut ends in {step}, which is neither the input nor a projection of it")
    if conv.source().kind != "input":
        raise MismatchError(f"the shortcut's {conv} reads {conv.source()}, not the block's input")
    return ShortcutSpec("projection", SiteSpec(conv.path, bn, False))


def _read_pad(step: Step) -> ShortcutSpec:
    """Option A: subsampling and zero channels, in either order."""
    stride, before = 1, 0
    while step.kind in ("subsample", "pad"):
        stride *= step.stride
        before += step.channels[0]
        step = step.source()
    if step.kind != "input":
        raise MismatchError(f"the shortcut's zero padding reads {step}, not the block's input")
    return ShortcutSpec("pad", None, stride, before)


def _check_channels(spec: ChainSpec, module: nn.Module, padded: int | None) -> None:
    """Channel counts that cannot run, or would broadcast, are refused here rather than at run time."""
    start = width = _conv(module, spec.sites[0]).in_channels
    for site in spec.sites:
        width = _site_width(site, module, width)
    shortcut = spec.shortcut
    if shortcut.site is not None:
        start = _site_width(shortcut.site, module, start)
    elif shortcut.kind == "pad":
        start = width if padded is None else padded
    if shortcut.kind not in ("none", "module") and start != width:
        raise MismatchError(f"the shortcut adds {start} channels to {width}")
    if spec.post is not None:
        _check_features(spec.post, module, width)
        if isinstance(module.get_submodule(spec.post), nn.SyncBatchNorm):  # its node has no collectives
            raise MismatchError(f"batch norm '{spec.post}' after the add is a SyncBatchNorm")


def _site_width(site: SiteSpec, module: nn.Module, width: int) -> int:
    conv = _conv(module, site)
    if conv.in_channels != width:
        raise MismatchError(f"convolution '{site.conv}' takes {conv.in_channels} channels and gets {width}")
    if site.bn is not None:
        _check_features(site.bn, module, conv.out_channels)
    return conv.out_channels


def _check_features(path: str, module: nn.Module, channels: int) -> None:
    bn: Any = module.get_submodule(path)
    features = bn.running_mean.numel() if is_frozen_norm(bn) else bn.num_features
    if features != channels:
        raise MismatchError(f"batch norm '{path}' has {features} features for {channels} channels")


def _conv(module: nn.Module, site: SiteSpec) -> nn.Conv2d:
    return cast(nn.Conv2d, module.get_submodule(site.conv))


def output_size(conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """The spatial size that ``conv`` makes of ``size``; not positive where the input is too small."""
    span = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    pad = span if conv.padding == "same" else [0, 0] if conv.padding == "valid" else [2 * int(p) for p in conv.padding]
    height, width = ((n + p - s - 1) // t + 1 for n, p, s, t in zip(size, pad, span, conv.stride, strict=True))
    return height, width


def chain_size(spec: ChainSpec, module: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """The spatial size of the last convolution's output for an input of ``size``."""
    for site in spec.sites:
        size = output_size(_conv(module, site), size)
    return size


def _check_sizes(spec: ChainSpec, module: nn.Module) -> None:
    """A shortcut whose spatial size can never be the main path's."""
    if spec.shortcut.kind in ("none", "module"):
        return
    for n in _SIZES:
        main, skip = chain_size(spec, module, (n, n)), (n, n)
        if spec.shortcut.site is not None:
            skip = output_size(_conv(module, spec.shortcut.site), skip)
        elif spec.shortcut.kind == "pad":
            skip = (-(-n // spec.shortcut.stride),) * 2
        if main == skip:
            return
    raise MismatchError(
        f"for a {n}x{n} input the shortcut is {skip[0]}x{skip[1]} and the main path {main[0]}x{main[1]}, "
        "which cannot be added; the padding or the stride of a convolution does not fit"
    )
