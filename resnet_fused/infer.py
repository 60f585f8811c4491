"""A block in eval mode with nothing to keep: batch norm, add and ReLU in the epilogues of its convolutions.

Only engines with ``site_infer`` run blocks so. The running statistics are read at every call, so a loaded state dict
or an optimizer step is never missed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import engines, projected
from .calls import Source
from .links import Link, bind, plain_projection
from .reference import pad_residual
from .site import is_observed


def infers(link: Link, engine: str) -> bool:
    """Whether the block runs on running statistics alone, with nothing kept, on an engine with kernels for that.

    Nothing is seen of a site then, so not while somebody observes the sites.
    """
    if torch.is_grad_enabled() or is_observed() or not hasattr(engines.get(engine), "site_infer"):
        return False
    if link.spec.post is not None:
        return False
    sites = [site for site in link.spec.site_specs() if site.bn is not None]
    return not any(bind(link.block, site, engine)[0].training for site in sites)


def infer_link(link: Link, engine: str, x: Tensor) -> Tensor:
    """One block in eval mode: every batch norm, the add and the ReLU in the epilogue of a convolution."""
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
    if spec.pool is not None:
        out = nn.functional.max_pool2d(out, spec.pool.kernel, spec.pool.stride, spec.pool.padding)
    return out


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
