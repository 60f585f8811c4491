"""Layer responses while training, from the moments that the forward makes anyway."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..calls import SiteCall, SiteOutputs, SiteParams
from ..graphs import GraphedModel
from ..site import observed
from .responses import CLOSED, LayerResponse, LayerResponses, Spread, channels_of_moments
from .sites import Site, SiteIndex, chain_sites, is_norm, order_of

_Forward = dict[str, tuple[Tensor, float]]  # by a site's name: its moments, as they lie on the device, and its eps


class ResponseWatch:
    """What `watch_responses` yields. Reading computes and waits for the device; collecting does neither."""

    def __init__(self, model: nn.Module, sites: list[Site], keep: int) -> None:
        self._sites = {site.name: site for site in sites}
        self._index = SiteIndex(sites)
        self._order = order_of(model)
        self._norms = [name for name, module in model.named_modules() if is_norm(module)]
        self._kept: deque[_Forward] = deque(maxlen=keep)
        self._first = ""
        self.forwards = 0

    def observe(self, call: SiteCall, params: SiteParams, outputs: SiteOutputs) -> None:
        """Keep a training site's moments; what checkpointing computes again in the backward is not new."""
        if not call.training or torch._C._current_graph_task_id() != -1:
            return
        site = self._index.find(params.weight)
        if site is None:
            return
        self._first = self._first or site.name
        if site.name == self._first:
            self._kept.append({})
            self.forwards += 1
        self._kept[-1][site.name] = (outputs.moments, call.eps)

    def latest(self, kernel: str | int | tuple[int, ...] | None = None) -> LayerResponses:
        """The responses of the last forward.

        Raises:
            RuntimeError: none was seen.
            ValueError: as `LayerResponses.only`.
        """
        return self._pooled(list(self._kept)[-1:]).only(kernel)

    def pooled(self, kernel: str | int | tuple[int, ...] | None = None) -> LayerResponses:
        """The responses of all kept forwards, pooled; raises as `latest`."""
        return self._pooled(self._kept).only(kernel)

    def history(self, kernel: str | int | tuple[int, ...] | None = None) -> list[LayerResponses]:
        """The responses of every kept forward, the oldest first; raises ValueError as `LayerResponses.only`."""
        return [self._pooled([forward]).only(kernel) for forward in self._kept]

    def _pooled(self, forwards: Iterable[_Forward]) -> LayerResponses:
        spreads: dict[str, Spread] = {}
        forwards = list(forwards)
        for forward in forwards:
            for name, (moments, eps) in forward.items():
                spreads.setdefault(name, Spread()).add(channels_of_moments(moments, eps))
        if not spreads:
            raise RuntimeError(
                "watch_responses: expected a forward in training mode through fused blocks, saw none; compiled and "
                "graphed models run without the observer, in eval mode there are no batch statistics (layer_responses)"
            )
        rows = []
        for name in sorted(spreads, key=self._order.__getitem__):
            site = self._sites[name]
            rows.append(LayerResponse(name, site.norm, site.conv.kernel_size, spreads[name].std, CLOSED))  # type: ignore[arg-type]
        seen = {row.norm for row in rows}
        return LayerResponses(tuple(rows), len(forwards), tuple(norm for norm in self._norms if norm not in seen))


@contextlib.contextmanager
def watch_responses(model: nn.Module, keep: int = 1) -> Iterator[ResponseWatch]:
    """Collect layer responses from a fused model's own training forwards, at no cost.

    ::

        with resnet_fused.watch_responses(model) as responses:
            for images, labels in loader:
                ...                               # your training step
                print(responses.latest("3x3"))    # whenever you like

    Nothing is computed, no hook is set and no device is waited for until you read: of every forward in training mode
    the moments of each site are kept as they are, five numbers a channel. Training is bitwise what it is without.
    Sites outside fused blocks, and those whose batch norm runs on running statistics, are listed as ``unseen``;
    `layer_responses` measures them. A forward begins with its first site; under activation checkpointing only the
    first computation counts.

    Args:
        model: fused, or with blocks of this package; may be wrapped (DistributedDataParallel).
        keep: the number of forwards kept, the latest ones.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: nothing in it is fused, it is compiled or graphed (such code runs without the observer), or ``keep``
            is less than 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch_responses: model: expected a torch.nn.Module, got {type(model).__name__}")
    if keep < 1:
        raise ValueError(f"watch_responses: keep: expected at least 1 forward, got {keep}")
    for module in model.modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise ValueError(
                "watch_responses: model: expected one that runs eagerly, got a compiled one, whose code has no "
                "observer; layer_responses measures its uncompiled module"
            )
        if isinstance(module, GraphedModel):
            raise ValueError("watch_responses: model: expected one that runs eagerly, got one of resnet_fused.graphed")
    sites = chain_sites(model)
    if not sites:
        raise ValueError("watch_responses: model: expected fused blocks, got none; call fuse first")
    watch = ResponseWatch(model, sites, keep)
    with observed(watch.observe):
        yield watch
