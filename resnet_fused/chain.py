"""Composition: blocks bound to their modules, run one after another as one chain of nodes.

A run of blocks keeps the activation between two of them *pending* where it may: the next block's first
site then applies batch norm, shortcut and ReLU itself and hands out the result for its own skip (a
join). The extent of a chain is a block, a stage (the blocks of an ``nn.Sequential``) or a trunk.
Inside a run memory is channels_last; the layout the caller would have got is restored at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import engines
from .nodes import CloseFunction, NodeCall, Pending, PoolFunction, SiteFunction
from .recompute import RecomputeFunction
from .site import SiteCall, SiteParams, Skip
from .spec import ChainSpec, SiteSpec

_POINTWISE = (1, 1)


class Link(NamedTuple):
    """A block in a run: its module, its spec, how much it keeps for backward, and the engine asked for."""

    block: nn.Module
    spec: ChainSpec
    memory: str = "speed"
    engine: str | None = None


def child(module: nn.Module, path: str) -> Any:
    """The submodule at ``path``, as `nn.Module.get_submodule` but without its checks and its type."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _conv_padding(conv: nn.Conv2d) -> tuple[int, int]:
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))  # type: ignore[return-value]
    return conv.padding  # type: ignore[return-value]


def _bind(block: nn.Module, site: SiteSpec, engine: str) -> tuple[SiteCall, SiteParams]:
    """A site's static call and its tensors, read from the block's own modules at this moment."""
    conv = child(block, site.conv)
    bn = child(block, site.bn or "")
    tracked = bn.running_mean is not None
    batch_norm = isinstance(bn, nn.modules.batchnorm._BatchNorm)
    training = batch_norm and (bn.training or not tracked)
    moving = not training or (bn.training and bn.track_running_stats and tracked)
    call = SiteCall(
        engine,
        conv.stride,
        _conv_padding(conv),
        conv.dilation,
        conv.groups,
        site.relu,
        training,
        bn.momentum if batch_norm else 0.0,
        bn.eps,
    )
    params = SiteParams(
        conv.weight,
        conv.bias,
        bn.weight,
        bn.bias,
        bn.running_mean if moving else None,
        bn.running_var if moving else None,
        bn.num_batches_tracked if training and moving else None,
    )
    return call, params


def _apply_site(
    state: Tensor | Pending, call: SiteCall, params: SiteParams, join: bool
) -> tuple[Pending, Tensor | None]:
    """One site node; ``join`` says that the activation is wanted too, for the block's shortcut."""
    tensors: tuple[Tensor | None, ...]
    if isinstance(state, Pending):
        kind = "join" if join or state.skip.kind != "none" else "pending"
        node = NodeCall(kind, state.relu, state.skip, (call,))
        tensors = (state.y, state.moments, state.carrier, *state[5:])
    else:
        node = NodeCall("plain", True, Skip(), (call,))
        tensors = (state, None, None, None, None, None)
    y, moments, carrier, *rest = SiteFunction.apply(node, *tensors, *params)
    x = rest[0] if rest else None
    if isinstance(state, Tensor) and not state.requires_grad:
        x = state
    return Pending(y, moments, carrier, call.relu), x


def close(state: Tensor | Pending, engine: str, promote: bool = False) -> Tensor:
    """Materialise a pending activation: the end of a run, or before a module that is not a link."""
    if isinstance(state, Tensor):
        return state
    wide = None
    if state.residual is not None and state.residual.dtype != state.y.dtype and state.residual_moments is None:
        wide = torch.promote_types(state.y.dtype, state.residual.dtype) if promote else None
        if wide is None:
            state = state._replace(residual=state.residual.to(state.y.dtype))
    return CloseFunction.apply(engine, state.relu, state.skip, wide, state.y, state.moments, state.carrier, *state[5:])


def _plain_projection(link: Link, site: SiteSpec, x: Tensor) -> Tensor:
    """A projection without batch norm: an ordinary convolution, finished."""
    conv = child(link.block, site.conv)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    weight = conv.weight.to(x.dtype)
    out = nn.functional.conv2d(x, weight, bias, conv.stride, _conv_padding(conv), conv.dilation, conv.groups)
    return out.contiguous(memory_format=torch.channels_last)


def _skip(link: Link) -> Skip:
    shortcut = link.spec.shortcut
    return Skip(shortcut.kind, shortcut.stride, shortcut.channel_offset)


def _residual(link: Link, engine: str, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The block's shortcut as the triple a close reads: tensor, and for a projection moments and carrier."""
    site = link.spec.shortcut.site
    if link.spec.shortcut.kind == "none":
        return None, None, None
    if site is None:
        return x, None, None
    if site.bn is None:
        return _plain_projection(link, site, x), None, None
    branch, _ = _apply_site(x, *_bind(link.block, site, engine), False)
    return branch.y, branch.moments, branch.carrier


def _run_link(link: Link, engine: str, state: Tensor | Pending, original: Tensor | None) -> Tensor | Pending:
    """One block, a node per site. ``original``: the shortcut's input, where autocast's cast made another."""
    spec = link.spec
    x: Tensor | None = None
    for i, site in enumerate(spec.sites):
        state, handed = _apply_site(state, *_bind(link.block, site, engine), spec.shortcut.kind != "none" and i == 0)
        x = handed if i == 0 else x
    assert isinstance(state, Pending)
    if spec.pool is not None:
        window = (spec.pool.kernel, spec.pool.stride, spec.pool.padding)
        return PoolFunction.apply(engine, state.relu, window, state.y, state.moments, state.carrier)
    if spec.shortcut.kind == "none" or x is None:
        return state
    residual = _residual(link, engine, x)
    if original is not None and spec.shortcut.site is None:
        residual = (original, None, None)
    return Pending(state.y, state.moments, state.carrier, spec.relu, _skip(link), *residual)


def recomputes(link: Link) -> bool:
    """Whether the block runs a recomputing node: "min" always, "lean" where the last of its sites is 1x1."""
    if link.spec.pool is not None or link.memory == "speed":
        return False
    last = child(link.block, link.spec.sites[-1].conv)
    return link.memory == "min" or (len(link.spec.sites) > 1 and last.kernel_size == _POINTWISE)


def _run_recomputing(link: Link, engine: str, x: Tensor) -> Tensor:
    """One block in memory mode "lean" (its last site rebuilt) or "min" (all of it); ends materialised."""
    spec, shortcut = link.spec, link.spec.shortcut
    bound = [_bind(link.block, site, engine) for site in spec.sites]
    state: Tensor | Pending = x
    first = 0
    handed: Tensor | None = x
    if link.memory == "lean":
        first = len(bound) - 1
        for i, (call, params) in enumerate(bound[:first]):
            state, passed = _apply_site(state, call, params, False)
            handed = passed if i == 0 else handed
    projection: SiteCall | None = None
    residual: tuple[Tensor | None, ...] = (None, None, None)
    flat = [t for _, p in bound[first:] for t in p]
    if link.memory == "min" and shortcut.site is not None and shortcut.site.bn is not None:
        projection, params = _bind(link.block, shortcut.site, engine)
        flat.extend(params)
    elif link.memory == "lean" or shortcut.site is not None:
        assert handed is not None
        residual = _residual(link, engine, handed)
    relu = spec.sites[-1].relu if shortcut.kind == "none" else spec.relu
    source: tuple[Tensor | None, ...] = (state, None, None) if isinstance(state, Tensor) else state[:3]
    kind = "plain" if isinstance(state, Tensor) else "pending"
    source_relu = isinstance(state, Tensor) or state.relu
    calls = tuple(call for call, _ in bound[first:])
    node = NodeCall(kind, source_relu, Skip(), calls, projection, _skip(link), relu)
    return RecomputeFunction.apply(node, *source, *residual, *flat)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype the convolutions run in: autocast's, where autocast would cast."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


class Run:
    """A chain being executed: feeds links and ordinary modules, and closes at the end."""

    def __init__(self, x: Tensor) -> None:
        self._state: Tensor | Pending = x
        self._entering = True
        self._engine = ""
        self._channels_last = False
        self._promote = False

    def takes(self, link: Link) -> bool:
        """Whether the block may run fused on this input; what stock modules reject is left to them."""
        state, weight = self._state, child(link.block, link.spec.sites[0].conv).weight
        x = state.y if isinstance(state, Pending) else state
        if x.dim() != 4 or x.shape[1] != child(link.block, link.spec.sites[0].conv).in_channels:
            return False
        if not x.is_floating_point() or x.device != weight.device:
            return False
        wide = torch.float64 in (x.dtype, weight.dtype)
        return x.dtype == weight.dtype or (torch.is_autocast_enabled(x.device.type) and not wide)

    def feed(self, link: Link) -> None:
        """Run one block on the current state."""
        original: Tensor | None = None
        if isinstance(self._state, Tensor):
            original = self._enter(link, self._state)
        if recomputes(link) and original is None:
            self._state = _run_recomputing(link, self._engine, self._materialised())
        else:
            self._state = _run_link(link, self._engine, self._state, original)
        self._promote = not link.spec.inplace_add
        if original is not None:
            self._materialised()

    def feed_module(self, module: nn.Module) -> None:
        """Run a module that is not a link, on what the caller's own code would have given it."""
        self._state = module(self.finish())
        self._entering = True

    def finish(self) -> Tensor:
        """The output, in the layout the stock modules return."""
        out = self._materialised()
        return out if self._channels_last or self._entering else out.contiguous()

    def _enter(self, link: Link, x: Tensor) -> Tensor | None:
        """Bring a tensor into the chain's dtype and layout; returns it as it was if an add must promote."""
        if self._entering:
            weight = child(link.block, link.spec.sites[0].conv).weight
            self._channels_last = _is_channels_last(x) or _is_channels_last(weight)
            self._entering = False
        dtype = _compute_dtype(x)
        self._engine = engines.select(x.device, dtype, link.engine)
        self._state = x.to(dtype, memory_format=torch.channels_last)
        return x if x.dtype != dtype and not link.spec.inplace_add else None

    def _materialised(self) -> Tensor:
        self._state = close(self._state, self._engine, self._promote)
        return self._state
