"""Composition: blocks bound to their modules, run one after another as one chain of nodes.

A run of blocks keeps the activation between two of them *pending* where it may: the next block's first
site then applies batch norm, shortcut and ReLU itself and hands out the result for its own skip (a
join). The extent of a chain is a block, a stage (the blocks of an ``nn.Sequential``) or a trunk.
Inside a run memory is channels_last; the layout the caller would have got is restored at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import engines
from .calls import NO_SKIP, SiteCall, SiteParams, Skip, handed
from .closed import ClosedSiteFunction
from .infer import infer_link, infers
from .links import Link, bind, child, conv_padding, is_frozen_norm, module_shortcut, plain_projection, weight_and_bias
from .nodes import CloseFunction, NodeCall, Pending, PoolFunction, SiteFunction
from .postnorm import PostNormFunction
from .recompute import RecomputeFunction
from .spec import SiteSpec

_POINTWISE = (1, 1)
_STEPPING = ("triton",)  # engines whose kernels load a view that steps over pixels


def _apply_site(
    state: Tensor | Pending, call: SiteCall, params: SiteParams, join: bool
) -> tuple[Pending, Tensor | None]:
    """One site node; ``join`` says that the activation is wanted too, for the block's shortcut."""
    x: Tensor | None = None
    if isinstance(state, Pending):
        y, moments, carrier, relu, skip, *residual = state
        kind = "join" if join or skip.kind != "none" else "pending"
        node = NodeCall(kind, relu, skip, (call,))
        made = SiteFunction.apply(node, y, moments, carrier, *residual, *params)
    else:
        hands = join and state.requires_grad
        node = NodeCall("plain", True, NO_SKIP, (call,), hands=hands)
        made = SiteFunction.apply(node, state, None, None, None, None, None, *params)
        x = handed(state, call.hand_stride) if join and not hands else None
    if len(made) > 3:
        x = made[3]
    return Pending(made[0], made[1], made[2], call.relu), x


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


def _skip(link: Link) -> Skip:
    shortcut = link.spec.shortcut
    kind = "identity" if shortcut.kind == "module" else shortcut.kind  # either way a tensor that is added as it is
    return Skip(kind, shortcut.stride, shortcut.channel_offset)


def hand_stride(link: Link, engine: str) -> int:
    """How many pixels the block's projection steps over: what it never reads is then not handed to it.

    Its gradient comes back as small as that. Only for engines whose kernels load such a view.
    """
    site = link.spec.shortcut.site
    if site is None or site.bn is None or engine not in _STEPPING:
        return 1
    conv = child(link.block, site.conv)
    stepping = conv.kernel_size == _POINTWISE and conv.stride[0] == conv.stride[1]
    return conv.stride[0] if stepping and conv_padding(conv) == (0, 0) else 1


def _residual(link: Link, engine: str, x: Tensor, step: int = 1) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The block's shortcut as the triple a close reads: tensor, and for a projection moments and carrier.

    ``x`` is the block's input, every ``step``-th pixel of it.
    """
    site = link.spec.shortcut.site
    if link.spec.shortcut.kind == "none":
        return None, None, None
    if site is None:
        return x, None, None
    if site.bn is None:
        return plain_projection(link, site, x, engine), None, None
    call, params = bind(link.block, site, engine)
    call = call._replace(projection=True, stride=call.stride if step == 1 else (1, 1))
    branch, _ = _apply_site(x, call, params, False)
    return branch.y, branch.moments, branch.carrier


def _run_closed(link: Link, engine: str, state: Pending, x: Tensor | None, step: int) -> Tensor:
    """The last site of a block and the block's end, whose shortcut reads ``x``, every ``step``-th pixel."""
    spec = link.spec
    residual: tuple[Tensor | None, ...] = (None, None, None) if x is None else _residual(link, engine, x, step)
    call, params = bind(link.block, spec.sites[-1], engine)
    relu = spec.sites[-1].relu if x is None else spec.relu
    node = NodeCall("pending", state.relu, NO_SKIP, (call,), None, NO_SKIP if x is None else _skip(link), relu)
    return ClosedSiteFunction.apply(node, *state[:3], *residual, *params)


def _closes(link: Link) -> bool:
    """Whether a block that ends its run may end it in its last site's node.

    Its shortcut's batch norm then runs before the last site's: not where they are one module.
    """
    spec = link.spec
    if len(spec.sites) == 1 or spec.pool is not None or spec.post is not None:
        return False
    if spec.shortcut.first or spec.shortcut.kind == "module":
        return False
    shortcut = spec.shortcut.site
    if shortcut is None:
        return True
    return shortcut.bn is not None and child(link.block, shortcut.bn) is not child(link.block, spec.sites[-1].bn or "")


def _run_link(
    link: Link, engine: str, state: Tensor | Pending, original: Tensor | None, last: bool = False
) -> Tensor | Pending:
    """One block, a node per site. ``original``: the shortcut's input, where autocast's cast made another.

    ``last``: nothing follows, so that the block may end in its last site's node.
    """
    spec = link.spec
    closing = last and original is None and _closes(link)
    branch = _residual(link, engine, state) if spec.shortcut.first and isinstance(state, Tensor) else None
    stride = 1 if original is not None or branch is not None else hand_stride(link, engine)
    first, *others = spec.sites
    call, params = bind(link.block, first, engine, stride)
    state, x = _apply_site(state, call, params, spec.shortcut.kind != "none" and branch is None)
    for site in others[:-1] if closing else others:
        state, _ = _apply_site(state, *bind(link.block, site, engine), False)
    if closing:
        return _run_closed(link, engine, state, x, stride)
    if spec.pool is not None:
        window = (spec.pool.kernel, spec.pool.stride, spec.pool.padding)
        return PoolFunction.apply(engine, state.relu, window, state.y, state.moments, state.carrier)
    if branch is None and x is not None and spec.shortcut.kind == "module":
        branch = (module_shortcut(link, x if original is None else original, state.y.shape), None, None)
    elif branch is None and x is not None:
        branch = _residual(link, engine, x, stride)
    if branch is None or spec.shortcut.kind == "none":
        return state
    if original is not None and spec.shortcut.kind in ("identity", "pad"):
        branch = (original, None, None)
    relu = spec.relu and spec.post is None
    ended = Pending(state.y, state.moments, state.carrier, relu, _skip(link), *branch)
    return ended if spec.post is None else _post_norm(link, engine, ended)


def _post_norm(link: Link, engine: str, ended: Pending) -> Pending:
    """The block's sum made, and the batch norm after it pending: whoever reads it applies affine and ReLU."""
    total = close(ended, engine, not link.spec.inplace_add)
    # A norm is bound with a convolution; that of the last site stands in, and its tensors are left out.
    call, params = bind(link.block, SiteSpec(link.spec.sites[-1].conv, link.spec.post, link.spec.relu), engine)
    y, moments, carrier = PostNormFunction.apply(call, total, None, None, *params[2:])
    return Pending(y, moments, carrier, link.spec.relu)


def recomputes(link: Link) -> bool:
    """Whether the block runs a recomputing node: "min" always, "lean" where the last of its sites is 1x1.

    A literal block never does: its batch norms would move in another order, and the sum it norms is kept anyway. Nor
    one with a shortcut that is a module: it keeps what it wants, and in a dtype of its own.
    """
    if link.memory == "speed" or link.spec.pool is not None or link.spec.is_literal():
        return False
    if link.spec.shortcut.kind == "module":
        return False
    last = child(link.block, link.spec.sites[-1].conv)
    return link.memory == "min" or (len(link.spec.sites) > 1 and last.kernel_size == _POINTWISE)


def _run_recomputing(link: Link, engine: str, x: Tensor) -> Tensor:
    """One block in memory mode "lean" (its last site rebuilt) or "min" (all of it); ends materialised."""
    spec, shortcut = link.spec, link.spec.shortcut
    bound = [bind(link.block, site, engine) for site in spec.sites]
    state: Tensor | Pending = x
    first = 0
    kept: Tensor | None = x
    if link.memory == "lean":
        first = len(bound) - 1
        for i, (call, params) in enumerate(bound[:first]):
            state, passed = _apply_site(state, call, params, i == 0)
            kept = passed if i == 0 else kept
    projection: SiteCall | None = None
    residual: tuple[Tensor | None, ...] = (None, None, None)
    flat = [t for _, p in bound[first:] for t in p]
    if link.memory == "min" and shortcut.site is not None and shortcut.site.bn is not None:
        projection, params = bind(link.block, shortcut.site, engine)
        projection = projection._replace(projection=True)
        flat.extend(params)
    elif link.memory == "lean" or shortcut.site is not None:
        assert kept is not None
        residual = _residual(link, engine, kept)
    relu = spec.sites[-1].relu if shortcut.kind == "none" else spec.relu
    source: tuple[Tensor | None, ...] = (state, None, None) if isinstance(state, Tensor) else state[:3]
    kind = "plain" if isinstance(state, Tensor) else "pending"
    source_relu = isinstance(state, Tensor) or state.relu
    calls = tuple(call for call, _ in bound[first:])
    node = NodeCall(kind, source_relu, Skip(), calls, projection, _skip(link), relu)
    return RecomputeFunction.apply(node, *source, *residual, *flat)


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype the convolutions run in: autocast's, where autocast would cast."""
    device = x.device.type
    if x.dtype != torch.float64 and _autocasts(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _mixes(state: Tensor | Pending) -> bool:
    """Whether a shortcut's module returned another dtype than the chain's, which a join does not take."""
    if isinstance(state, Tensor) or state.residual is None:
        return False
    return state.residual_moments is None and state.residual.dtype != state.y.dtype


def _wants_gradient(state: Pending) -> bool:
    return state.y.requires_grad or (state.residual is not None and state.residual.requires_grad)


def _promotes(link: Link, x: Tensor) -> bool:
    """Whether a frozen batch norm, which is arithmetic on its buffers, may give another dtype than the chain's."""
    for site in link.spec.site_specs():
        norm = child(link.block, site.bn) if site.bn else None
        if norm is None or type(norm) is nn.BatchNorm2d:
            continue
        if is_frozen_norm(norm) and norm.weight.dtype != compute_dtype(x):
            return True
    return False


def is_channels_last(t: Tensor) -> bool:
    """Whether a tensor is laid out in channels_last and not, as one of one channel may be, in both formats."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


class Run:
    """A chain being executed: feeds links and ordinary modules, and closes at the end."""

    def __init__(self, x: Tensor) -> None:
        self._state: Tensor | Pending = x
        self._entering = True
        self._engine = ""
        self._channels_last = False
        self._promote = False
        self._bound: float | None = None  # on the size of the state's elements

    def takes(self, link: Link) -> bool:
        """Whether the block may run fused on this input; what stock modules reject is left to them."""
        conv = child(link.block, link.spec.sites[0].conv)
        x, weight = self._state, weight_and_bias(conv)[0]
        if isinstance(x, Pending):
            x = x.y
        if x.dim() != 4 or x.shape[1] != conv.in_channels or x.device != weight.device:
            return False
        if not x.is_floating_point():
            return False
        wide = torch.float64 in (x.dtype, weight.dtype)
        if x.dtype != weight.dtype and (wide or not _autocasts(x.device.type)):
            return False
        return not _promotes(link, x)

    def feed(self, link: Link, last: bool = False) -> None:
        """Run one block on the current state; ``last`` where nothing will follow."""
        original: Tensor | None = None
        if link.spec.shortcut.first:
            self._materialised()
        if isinstance(self._state, Pending) and torch.is_grad_enabled() and not _wants_gradient(self._state):
            self._materialised()  # the end of what is frozen: a join would keep its raw output for no backward
        if isinstance(self._state, Tensor):
            original = self._enter(link, self._state)
        bound, self._bound = self._bound, None
        if original is None and isinstance(self._state, Tensor) and infers(link, self._engine, self._state):
            self._state, self._bound = infer_link(link, self._engine, self._state, bound)
        elif recomputes(link) and original is None:
            self._state = _run_recomputing(link, self._engine, self._materialised())
        else:
            self._state = _run_link(link, self._engine, self._state, original, last)
        self._promote = not link.spec.inplace_add
        if original is not None or _mixes(self._state):
            self._materialised()

    def feed_module(self, module: nn.Module) -> None:
        """Run a module that is not a link, on what the caller's own code would have given it."""
        self._state = module(self.finish())
        self._bound = None
        self._entering = True

    def finish(self) -> Tensor:
        """The output, in the layout the stock modules return."""
        out = self._materialised()
        return out if self._channels_last or self._entering else out.contiguous()

    def _enter(self, link: Link, x: Tensor) -> Tensor | None:
        """Bring a tensor into the chain's dtype and layout; returns it as it was if an add must promote."""
        laid = is_channels_last(x)
        if self._entering:
            self._channels_last = laid or is_channels_last(child(link.block, link.spec.sites[0].conv).weight)
            self._entering = False
        dtype = compute_dtype(x)
        self._engine = engines.select(x.device, dtype, link.engine)
        if not laid or dtype != x.dtype:
            self._state = x.to(dtype, memory_format=torch.channels_last)
        keeps = not link.spec.inplace_add or link.spec.shortcut.kind == "module"
        return x if x.dtype != dtype and keeps else None

    def _materialised(self) -> Tensor:
        self._state = close(self._state, self._engine, self._promote)
        return self._state
