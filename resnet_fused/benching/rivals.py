"""Stock networks whose batch norms run in another library: NVIDIA's apex, and InPlace-ABN.

Neither computes quite what stock does: apex's batch norm takes float16 alone, and InPlace-ABN must invert its
activation, so it is a leaky ReLU. They are timed, not proven.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recognise import find_chains
from ..reference import pad_residual
from ..spec import ChainSpec, SiteSpec

SLOPE = 0.01
# (batch norm, whether a ReLU follows): a module that is called with the convolution's output and what is added.
MakeNorm = Callable[[nn.BatchNorm2d, bool], nn.Module]


class RivalBlock(nn.Module):
    """A chain that runs its convolutions as they are, and every batch norm, add and ReLU by another library.

    Args:
        block: holds the convolutions and batch norms.  spec: the chain it computes.  norm: the library's.
    """

    def __init__(self, block: nn.Module, spec: ChainSpec, norm: MakeNorm) -> None:
        super().__init__()
        self._spec = spec
        self.convs = nn.ModuleList(block.get_submodule(site.conv) for site in spec.site_specs())
        last = len(spec.sites) - 1
        self.norms = nn.ModuleList(
            nn.Identity() if site.bn is None else norm(_norm_of(block, site), self._activates(i, site, last))
            for i, site in enumerate(spec.site_specs())
        )

    def _activates(self, index: int, site: SiteSpec, last: int) -> bool:
        if index == last and self._spec.shortcut.kind != "none":
            return self._spec.relu
        return site.relu and index <= last

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` channels_last, to what the block gives."""
        sites, shortcut = len(self._spec.sites), self._spec.shortcut
        out = x
        for conv, norm in zip(self.convs[: sites - 1], self.norms[: sites - 1]):
            out = norm(conv(out))
        y = self.convs[sites - 1](out)
        norm = self.norms[sites - 1]
        if shortcut.kind == "none":
            out = norm(y)
        elif shortcut.kind == "identity":
            out = norm(y, x)
        elif shortcut.kind == "pad":
            out = norm(y, pad_residual(x, y.shape[1], shortcut.stride, shortcut.channel_offset))
        else:
            out = norm(y, self.norms[sites](self.convs[sites](x)))
        pool = self._spec.pool
        return out if pool is None else F.max_pool2d(out, pool.kernel, pool.stride, pool.padding)


def _norm_of(block: nn.Module, site: SiteSpec) -> nn.BatchNorm2d:
    norm = block.get_submodule(str(site.bn))
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


def replace_norms(model: nn.Module, norm: MakeNorm) -> nn.Module:
    """Every chain of ``model`` and the stem of a known trunk with another library's batch norms, in place.

    Raises:
        ValueError: the model has no chain.
    """
    chains = [(name, block, spec) for name, block, spec in find_chains(model) if isinstance(spec, ChainSpec)]
    # a batch norm that is shared, or stands after the add, has no place in a `RivalBlock`
    found = [(name, block, spec) for name, block, spec in chains if not spec.is_literal()]
    if not found:
        raise ValueError("the network has no block whose batch norms could be replaced")
    for name, block, spec in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, RivalBlock(block, spec, norm))
    stem = getattr(model, "bn1", None)
    if type(stem) is nn.BatchNorm2d and type(getattr(model, "relu", None)) is nn.ReLU:
        model.bn1, model.relu = norm(stem, True), nn.Identity()
    return model


def _take_over(theirs: Any, ours: nn.BatchNorm2d) -> Any:
    """Parameters, statistics, eps and momentum; the library's own dtype stays."""
    theirs.eps, theirs.momentum = ours.eps, ours.momentum
    theirs.load_state_dict({**theirs.state_dict(), **ours.state_dict()})
    return theirs.to(ours.weight.device)


def _apex() -> Any:
    return importlib.import_module("apex.contrib.groupbn.batch_norm")


class ApexNorm(nn.Module):
    """apex's batch norm with its add and ReLU in one, over NHWC tensors; float32 parameters."""

    def __init__(self, bn: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        self.norm = _take_over(_apex().BatchNorm2d_NHWC(bn.num_features, fuse_relu=relu), bn)

    def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(N, C, H, W)`` channels_last, which is NHWC seen through a permutation."""
        z = None if residual is None else residual.permute(0, 2, 3, 1).contiguous()
        out: Tensor = self.norm(y.permute(0, 2, 3, 1).contiguous(), z)
        return out.permute(0, 3, 1, 2)


class InPlaceNorm(nn.Module):
    """InPlace-ABN: batch norm with a leaky ReLU, or, where a tensor is added, without, and the leaky ReLU after it."""

    def __init__(self, bn: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        library: Any = importlib.import_module("inplace_abn")
        # Whether something is added is known when it comes; both share parameters and statistics.
        self.norm = _take_over(library.InPlaceABN(bn.num_features, activation="identity", activation_param=SLOPE), bn)
        self._relu = relu

    def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(N, C, H, W)``; overwrites ``y``."""
        self.norm.activation = "leaky_relu" if self._relu and residual is None else "identity"
        out: Tensor = self.norm(y)
        if residual is None:
            return out
        out = out + residual
        return F.leaky_relu(out, SLOPE, inplace=True) if self._relu else out


def with_apex(model: nn.Module) -> nn.Module:
    """``model`` on apex's batch norms, in place."""
    return replace_norms(model, ApexNorm)


def with_inplace_abn(model: nn.Module) -> nn.Module:
    """``model`` on InPlace-ABN, in place."""
    return replace_norms(model, InPlaceNorm)


def apex_obstacle(device: torch.device, kind: torch.dtype) -> str | None:
    """Why apex's batch norm cannot run, or None."""
    try:
        _apex()
    except ImportError as error:
        return f"not installed: {error} (apex must be built with --bnp)"
    if device.type != "cuda" or kind is not torch.float16:
        return f"needs --device cuda and --dtype fp16 or --amp fp16; got {device} and {kind}"
    return None


def inplace_abn_obstacle() -> str | None:
    """Why InPlace-ABN cannot run, or None."""
    try:
        importlib.import_module("inplace_abn")
    except ImportError as error:
        return f"not installed: {error}"
    return None
