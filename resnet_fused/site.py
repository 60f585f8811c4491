"""Forward and backward of one site, and of a chain's close, as plain functions over an engine's name.

The Triton engine runs a whole site itself, convolution included: `site_forward`, `site_rebuild`, `site_backward`.
The CPU engine's sites are `engines.cpu_site`. For the reference engine `engines.library` puts the site together from
the vendor's convolution and the engine's primitives. A block's shortcut goes to the projection ops where they run
(`projected`). A site whose statistics are those of several processes is such a site with collectives around it
(`synchronise`).

Nothing here knows autograd or modules: the nodes of `resnet_fused.nodes` call these functions, in the
forward, in the backward, and to rebuild what a memory mode did not keep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import engines, projected, synchronise
from .calls import SiteCall, SiteGrads, SiteOutputs, SiteParams, Source
from .engines import cpu_site, library
from .kernels.launch import is_counting

Observer = Callable[[SiteCall, SiteParams, SiteOutputs], None]

_watcher: Callable[..., Any] | None = None
_observers: tuple[Observer, ...] = ()


@contextlib.contextmanager
def watched(watcher: Callable[..., Any]) -> Iterator[None]:
    """Call ``watcher(name, *arguments)`` at every `site_forward` and `site_backward` in the block."""
    global _watcher
    previous, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = previous


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Call ``observer(call, params, outputs)`` after every `site_forward` in the block; not in compiled code."""
    global _observers
    _observers = (*_observers, observer)
    try:
        yield
    finally:
        _observers = tuple(other for other in _observers if other is not observer)


def is_observed() -> bool:
    """Whether anybody observes the sites."""
    return bool(_observers)


def load_source(engine: str, source: Source) -> Tensor:
    """The activation a source stands for: the plain tensor, or ``act(z + shortcut)`` materialised."""
    return library.load_source(engines.get(engine), source)


def close_backward(engine: str, source: Source, out: Tensor | None, dout: Tensor, dskip: Tensor | None) -> SiteGrads:
    """Backward of a chain's end ``out = act(z + shortcut)``. See `library.close_backward`."""
    return library.close_backward(engines.get(engine), source, out, dout, dskip)


def site_forward(call: SiteCall, source: Source, params: SiteParams) -> SiteOutputs:
    """The raw output, its moments, and the activation that was convolved.

    Raises:
        ValueError: one value per channel in training, as ``F.batch_norm`` does.
    """
    if call.group is not None:
        return synchronise.site_forward(site_forward, call, source, params)
    if _watcher is not None:
        _watcher("forward", call, source, params)
    engine = engines.get(call.engine)
    if call.projection and projected.runs(call, source, params.weight):
        outputs = projected.site_forward(engine, call, source, params)
    elif call.engine == "cpu" and not is_counting():
        outputs = cpu_site.site_forward(engine, call, source, params)
    elif hasattr(engine, "site_forward"):
        outputs = engine.site_forward(call, source, params)
    else:
        outputs = library.site_forward(engine, call, source, params)
    if _observers and not torch.compiler.is_compiling():
        for observer in _observers:
            observer(call, params, outputs)
    return outputs


def site_rebuild(call: SiteCall, source: Source, weight: Tensor) -> Tensor:
    """The raw output ``y`` of `site_forward`, made again in the same way."""
    engine = engines.get(call.engine)
    if call.projection and projected.runs(call, source, weight):
        return projected.site_rebuild(call, source, weight)
    if call.engine == "cpu" and not is_counting():
        return cpu_site.site_rebuild(engine, call, source, weight)
    if hasattr(engine, "site_rebuild"):
        return engine.site_rebuild(call, source, weight)
    return library.site_rebuild(engine, call, source, weight)


def site_backward(
    call: SiteCall,
    source: Source,
    x: Tensor | None,
    params: Sequence[Tensor | None],
    y: Tensor,
    moments: Tensor,
    g: Tensor,
    sums: Tensor,
    dskip: Tensor | None,
    needs: tuple[bool, bool],
    mask: Tensor | None = None,
) -> SiteGrads:
    """Backward of `site_forward`, given its ``mask`` and the first four of its `SiteParams`.

    See `library.site_backward`.

    Raises:
        ValueError: ``params`` has no weight.
    """
    weight = params[0]
    if weight is None:
        raise ValueError("site_backward: params: expected a convolution weight, got None")
    if not (needs[0] or needs[1]):
        return SiteGrads()
    if call.group is not None:
        before, after = (source, x, params, y, moments, g), (dskip, needs, mask)
        return synchronise.site_backward(site_backward, call, sums, before, after)
    if _watcher is not None:
        _watcher("backward", call, source, x, weight, y, moments, g, sums, dskip, needs, mask)
    engine = engines.get(call.engine)
    if call.projection and projected.runs(call, source, weight):
        return projected.site_backward(call, source, weight, y, moments, g, sums, dskip, needs)
    if call.engine == "cpu" and not is_counting():
        return cpu_site.site_backward(engine, call, source, x, params, y, moments, g, sums, dskip, needs)
    if hasattr(engine, "site_backward"):
        return engine.site_backward(call, source, x, weight, y, moments, g, sums, dskip, needs, mask)
    return library.site_backward(engine, call, source, x, weight, y, moments, g, sums, dskip, needs)
