"""Composition: blocks bound to their modules, run one after another as one chain of nodes.

A run of blocks keeps the activation between two of them *pending* where it may: the next block's first
site then applies batch norm, shortcut and ReLU itself and hands out the result for its own skip (a
join). The extent of a chain is a block, a stage (the blocks of an ``nn.Sequential``) or a trunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import NO_SKIP, SiteCall, SiteParams, Skip, handed
from .closed import ClosedSiteFunction
from .links import Link, bind, child, conv_padding, module_shortcut, plain_projection
from .nodes import CloseFunction, NodeCall, Pending, PoolFunction, SiteFunction
from .postnorm import PostNormFunction
from .recompute import RecomputeFunction
from .spec import SiteSpec

_POINTWISE = (1, 1)
_STEPPING = ("triton",)  # engines whose kernels load a view that steps over pixels


def apply_site(
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
    branch, _ = apply_site(x, call, params, False)
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
    return shortcut is None or (shortcut.bn is not None and not _shares_norm(link))


def run_link(
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
    state, x = apply_site(state, call, params, spec.shortcut.kind != "none" and branch is None)
    for site in others[:-1] if closing else others:
        state, _ = apply_site(state, *bind(link.block, site, engine), False)
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
    if link.spec.shortcut.kind == "module" or _shares_norm(link):
        return False
    last = child(link.block, link.spec.sites[-1].conv)
    return link.memory == "min" or (len(link.spec.sites) > 1 and last.kernel_size == _POINTWISE)


def _shares_norm(link: Link) -> bool:
    """Whether the projection's batch norm is one of the main path's too, perhaps since `fuse`."""
    site = link.spec.shortcut.site
    if site is None or site.bn is None:
        return False
    own = child(link.block, site.bn)
    return any(child(link.block, other.bn or "") is own for other in link.spec.sites)


def run_recomputing(link: Link, engine: str, x: Tensor) -> Tensor:
    """One block in memory mode "lean" (its last site rebuilt) or "min" (all of it); ends materialised."""
    spec, shortcut = link.spec, link.spec.shortcut
    bound = [bind(link.block, site, engine) for site in spec.sites]
    state: Tensor | Pending = x
    first = 0
    kept: Tensor | None = x
    if link.memory == "lean":
        first = len(bound) - 1
        for i, (call, params) in enumerate(bound[:first]):
            state, passed = apply_site(state, call, params, i == 0)
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
