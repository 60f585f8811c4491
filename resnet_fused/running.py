"""A chain being executed: what goes in, in which dtype and layout, block by block, and what comes out.

Inside a run memory is channels_last; the layout the caller would have got is restored at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import engines
from .chain import close, recomputes, run_link, run_recomputing
from .infer import infer_link, infers
from .links import Link, child, is_frozen_norm, weight_and_bias
from .nodes import Pending


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
            self._state = run_recomputing(link, self._engine, self._materialised())
        else:
            self._state = run_link(link, self._engine, self._state, original, last)
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
