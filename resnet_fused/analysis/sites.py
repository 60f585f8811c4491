"""The sites of a model by name: those that its fused blocks run, and the order all stand in."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..links import child, weight_and_bias
from ..structure import BINDING, Binding
from ..tracing import leaf_kind


class Site(NamedTuple):
    """A convolution with its batch norm, of a fused block; ``name`` and ``norm`` are their paths in the model."""

    name: str
    norm: str
    conv: nn.Module
    block: nn.Module

    def modules(self) -> set[nn.Module]:
        """All that the block's chain stands for: a hook on any of them makes the block run as it was written."""
        return {child(self.block, path) for path in self.block.__dict__[BINDING].spec.paths()}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm of any kind, a frozen one included."""
    kind = type(module).__name__ == "FrozenBatchNorm2d" or isinstance(module, nn.modules.batchnorm._BatchNorm)
    return kind or leaf_kind(module) == "bn"


def chain_sites(model: nn.Module) -> list[Site]:
    """Every site that a fused block of ``model`` (or the stem of a fused trunk) runs, when it runs as a chain."""
    paths = {module: name for name, module in model.named_modules()}
    found = []
    for block in model.modules():
        binding: Binding | None = block.__dict__.get(BINDING)
        if binding is None or binding.spec is None:
            continue
        for spec in binding.spec.site_specs():
            if spec.bn is not None:
                conv, bn = child(block, spec.conv), child(block, spec.bn)
                found.append(Site(paths[conv], paths[bn], conv, block))
    return found


class SiteIndex:
    """Finds a site by the weight its convolution has at this moment: sharding and ``.to()`` may give it another."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self._known: dict[int, Site] = {}

    def find(self, weight: Tensor) -> Site | None:
        """The site, or None for another model's."""
        site = self._known.get(id(weight))
        if site is not None and site.conv._parameters.get("weight") is weight:
            return site
        for site in self.sites:
            if weight_and_bias(site.conv)[0] is weight:
                self._known[id(weight)] = site
                return site
        return None


def order_of(model: nn.Module) -> dict[str, int]:
    """The place of every module's name in network order."""
    return {name: place for place, (name, _) in enumerate(model.named_modules())}
