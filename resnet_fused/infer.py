"""A block in eval mode with nothing to keep: batch norm, add and ReLU in the epilogues of its convolutions.

Engines with ``site_infer`` run blocks so, and any engine a block that `resnet_fused.fold` folded. The running
statistics are read at every call, so a loaded state dict or an optimizer step is never missed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import engines, folded, projected
from .calls import Source
from .folded import FOLDED
from .kernels.launch import is_counting
from .links import Link, bind, child, plain_projection, takes_batch_statistics, weight_and_bias
from .reference import pad_residual
from .site import is_observed
from .spec import SiteSpec


def infers(link: Link, engine: str, x: Tensor) -> bool:
    """Whether the block runs on running statistics alone, with nothing kept, and can do so at once.

    So it does where gradients are recorded too, if neither ``x`` nor a parameter wants one. Nothing is
    seen of a site then, so not while somebody observes the sites.
    """
    if link.spec.post is not None or link.spec.shortcut.kind == "module" or is_observed():
        return False  # the add of a module's result may promote, or broadcast
    if not (_is_folded(link, engine, x) or _has_kernels(link, engine)):
        return False
    if any(takes_batch_statistics(child(link.block, site.bn)) for site in link.spec.site_specs() if site.bn):
        return False
    return not torch.is_grad_enabled() or not (x.requires_grad or _trains(link))


def _has_kernels(link: Link, engine: str) -> bool:
    """Whether the engine runs the block's sites in inference; the CPU's pool applies the batch norm as it loads."""
    if not hasattr(engines.get(engine), "site_infer"):
        return False
    return engine != "cpu" or not (is_counting() or link.spec.pool is not None)


def _trains(link: Link) -> bool:
    paths = [path for site in link.spec.site_specs() for path in (site.conv, site.bn) if path]
    tensors = [t for path in paths for t in weight_and_bias(child(link.block, path))]
    return any(t is not None and t.requires_grad for t in tensors)


def _is_folded(link: Link, engine: str, x: Tensor) -> bool:
    """Whether the block runs on its folded filters: not where the engine applies the affine at no cost of its own.

    The GPU's kernels do, and the CPU's own products.
    """
    if torch.compiler.is_compiling() or is_counting() or engine == "triton" or FOLDED not in link.block.__dict__:
        return False
    folds_itself = getattr(engines.get(engine), "folds_itself", None)
    if folds_itself is None:
        return True
    call, params = bind(link.block, link.spec.sites[0], engine)
    return not folds_itself(call, x, params)


def infer_link(link: Link, engine: str, x: Tensor, bound: float | None = None) -> tuple[Tensor, float | None]:
    """One block in eval mode, and a bound on the size of its output where it is known as that of ``x`` is."""
    if _is_folded(link, engine, x):
        return _folded_link(link, engine, x, bound)
    spec, infer = link.spec, engines.get(engine).site_infer
    out = x
    for site in spec.sites[:-1]:
        call, params = bind(link.block, site, engine)
        out = infer(call, out, params, None, site.relu)
    call, params = bind(link.block, spec.sites[-1], engine)
    if spec.shortcut.kind == "none":
        out = infer(call, out, params, None, spec.sites[-1].relu)
    else:
        out = infer(call, out, params, _inferred_residual(link, engine, x, params.weight.shape[0]), spec.relu)
    return _pooled(link, out), None


def _pooled(link: Link, out: Tensor) -> Tensor:
    pool = link.spec.pool
    return out if pool is None else nn.functional.max_pool2d(out, pool.kernel, pool.stride, pool.padding)


def _inferred_residual(link: Link, engine: str, x: Tensor, channels: int) -> Tensor:
    shortcut = link.spec.shortcut
    if shortcut.kind == "pad":
        return pad_residual(x, channels, shortcut.stride, shortcut.channel_offset)
    if shortcut.site is None:
        return x
    if shortcut.site.bn is None:
        return plain_projection(link, shortcut.site, x, engine)
    call, params = bind(link.block, shortcut.site, engine)
    call = call._replace(projection=True)
    if projected.runs(call, Source("plain", x), params.weight):
        return projected.site_infer(engines.get(engine), call, x, params)
    return engines.get(engine).site_infer(call, x, params, None, False)


class _Sized(NamedTuple):
    """An activation, and a bound on the size of its elements: infinite where it is not known."""

    x: Tensor
    bound: float

    def measured(self) -> _Sized:
        return _Sized(self.x, folded.largest(self.x))


def _folded_link(link: Link, engine: str, x: Tensor, bound: float | None) -> tuple[Tensor, float]:
    """One block on its folded convolutions."""
    spec = link.spec
    source = _Sized(x, math.inf if bound is None else bound)
    if bound is None and folded.onednn(x):
        source = source.measured()
    sized, residual = source, None
    for site in spec.sites[:-1]:
        sized = _folded_site(link, engine, site, sized, None, site.relu)
    last = spec.sites[-1]
    if spec.shortcut.kind != "none":
        residual = _folded_residual(link, engine, source, child(link.block, last.conv).out_channels)
    relu = last.relu if residual is None else spec.relu
    out = _folded_site(link, engine, last, sized, residual, relu, owned=spec.shortcut.kind == "projection")
    return _pooled(link, out.x), out.bound


def _folded_residual(link: Link, engine: str, source: _Sized, channels: int) -> _Sized:
    shortcut = link.spec.shortcut
    if shortcut.site is not None:
        return _folded_site(link, engine, shortcut.site, source, None, False)
    if shortcut.kind == "pad":
        padded = pad_residual(source.x, channels, shortcut.stride, shortcut.channel_offset)
        return _Sized(padded.contiguous(memory_format=torch.channels_last), source.bound)
    return source


def _folded_site(
    link: Link, engine: str, spec: SiteSpec, source: _Sized, residual: _Sized | None, relu: bool, owned: bool = False
) -> _Sized:
    """One convolution, the add and the ReLU; what bounds the sizes is measured again where the bound grew too large."""
    store: folded.Folded = link.block.__dict__[FOLDED]
    call, params = folded.plain_call(link, spec, engine) if spec.bn is None else bind(link.block, spec, engine)
    site = store.site(spec.conv, call, params, source.x)
    limit = folded.limit(source.x.dtype)

    def reach() -> float:
        return site.gain * source.bound + site.shift + (0.0 if residual is None else residual.bound)

    if site.packed and not reach() < limit:
        source, residual = source.measured(), None if residual is None else residual.measured()
    added = None if residual is None else residual.x
    out = folded.run(site, call, source.x, added, relu, bounded=reach() < limit, owned=owned)
    return _Sized(out, reach())
