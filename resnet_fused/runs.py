"""Loose runs of convolution, batch norm, ReLU and max pool in a network's own forward: stems, mostly.

A network is traced on a copy with its blocks as leaves. Only the order of the calls is read from the graph: what
is found says which convolutions may wait for which batch norm (`deferred`), and the forward itself stays in charge.
So the graph need not be whole: a forward that cannot be recorded to its end has the runs found up to there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from .modules import STEM
from .recognise import Refusal, module_obstacle
from .spec import ChainSpec, PoolSpec, SiteSpec
from .steps import step_of
from .tracing import leaf_kind, record_partly, replicate

Found = tuple[str, nn.Module, "ChainSpec | Refusal"]


def find_runs(model: nn.Module, blocks: list[str], is_trunk: Callable[[nn.Module], bool]) -> list[Found]:
    """Every loose run of a model, with the module whose forward calls it; and where a network cannot be traced, why.

    Nothing inside a chain, or inside a block that is refused, is part of a run. The outermost module that can be
    traced is looked at first.

    Args:
        blocks: the names of what `find_chains` found.
        is_trunk: whether a module is a known network, whose stem is fused with its stages.

    Returns:
        ``(name, module, result)``; paths in a spec are from ``module``, names as in ``model.named_modules()``.
    """
    modules = [(name, m) for name, m in model.named_modules() if not _within(name, blocks)]
    open_to = {m for _, m in modules if leaf_kind(m) in ("conv", "bn")}
    for _, module in modules:
        if is_trunk(module):
            open_to -= {getattr(module, name) for name in STEM}
    runs: list[Found] = []
    refused: list[Found] = []
    for name, module in modules:
        mine = {m for m in module.modules() if m in open_to}
        if leaf_kind(module) is not None or {leaf_kind(m) for m in mine} != {"conv", "bn"}:
            continue
        prefix = f"{name}." if name else ""
        leaves = frozenset(block.removeprefix(prefix) for block in blocks if block.startswith(prefix))
        found, called, reason = _trace(module, leaves)
        found = [(owner, spec) for owner, spec in found if _convs(module.get_submodule(owner), spec) <= open_to]
        runs += [(f"{prefix}{owner}".rstrip("."), module.get_submodule(owner), spec) for owner, spec in found]
        if reason is not None and not found:
            refused.append((name, module, Refusal(reason)))
        open_to -= {module.get_submodule(path) for path in called}
    names = [name for name, _, _ in (*runs, *refused)]
    return [*runs, *(entry for entry in refused if sum(_within(name, [entry[0]]) for name in names) == 1)]


def _within(name: str, blocks: list[str]) -> bool:
    return any(not block or name == block or name.startswith(f"{block}.") for block in blocks)


def _convs(owner: nn.Module, spec: ChainSpec) -> set[nn.Module]:
    return {owner.get_submodule(site.conv) for site in spec.sites}


def _trace(net: nn.Module, leaves: frozenset[str]) -> tuple[list[tuple[str, ChainSpec]], tuple[str, ...], str | None]:
    """The runs that a network calls in training and in eval mode, each with its owner; what it calls; what stops it."""
    with torch.inference_mode(False):
        copy = replicate(net, lambda t: torch.empty_like(t, device="meta"))
    graph, called, reason = record_partly(copy, True, leaves)
    runs = _runs(net, graph)
    evaluation, _, _ = record_partly(copy, False, leaves)
    both = set(_runs(net, evaluation))
    if set(runs) - both and reason is None:
        reason = "its forward does different things in training and in eval mode"
    return [_owned(run, called) for run in runs if run in both], called, reason


def _owned(spec: ChainSpec, called: tuple[str, ...]) -> tuple[str, ChainSpec]:
    """The innermost called module that holds a whole run, and the run as seen from there."""
    parts = [path.split(".")[:-1] for path in spec.paths()]
    common: list[str] = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    while common and ".".join(common) not in called:
        common.pop()
    owner = ".".join(common)
    cut = len(owner) + 1 if owner else 0
    sites = tuple(SiteSpec(site.conv[cut:], (site.bn or "")[cut:], site.relu) for site in spec.sites)
    inner = tuple(path[cut:] for path in spec.inner)
    return owner, ChainSpec(sites, relu=spec.relu, pool=spec.pool, inner=inner)


def _runs(net: nn.Module, graph: Graph) -> list[ChainSpec]:
    times = Counter(node.target for node in graph.nodes if node.op == "call_module")
    reader = _Reader(net, {str(target) for target, n in times.items() if n > 1})
    runs: list[ChainSpec] = []
    taken: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in taken and reader.site_part(node, "conv"):
            spec = reader.run(node)
            if spec is not None:
                runs.append(spec)
                taken |= {site.conv for site in spec.sites}
    return runs


class _Reader:
    """Reads runs off a graph of ``net``; ``shared`` are the modules it calls more than once."""

    def __init__(self, net: nn.Module, shared: set[str]) -> None:
        self.net, self.shared = net, shared
        self.inner: list[str] = []

    def site_part(self, node: Node, kind: str) -> bool:
        """Whether a node calls a convolution or batch norm that a run may hold."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or node.target in self.shared:
            return False
        module = self.net.get_submodule(str(node.target))
        exact = nn.Conv2d if kind == "conv" else nn.BatchNorm2d
        return leaf_kind(module) == kind and isinstance(module, exact) and module_obstacle(module) is None

    def run(self, node: Node) -> ChainSpec | None:
        """The longest run that begins with the convolution ``node``."""
        self.inner = []
        sites: list[SiteSpec] = []
        pool: PoolSpec | None = None
        while (norm := self.next(node, "bn")) is not None:
            conv: Any = self.net.get_submodule(str(node.target))
            bn: Any = self.net.get_submodule(str(norm.target))
            if bn.num_features != conv.out_channels:
                break
            relu = self.next(norm, "relu")
            end = norm if relu is None else relu
            sites.append(SiteSpec(str(node.target), str(norm.target), relu is not None))
            following = self.next(end, "conv")
            if following is None:
                pooled = self.next(end, "pool")
                pool = None if pooled is None else step_of(self.net, pooled).pool  # type: ignore[union-attr]
                break
            node = following
        if not sites:
            return None
        return ChainSpec(tuple(sites), relu=sites[-1].relu, pool=pool, inner=tuple(self.inner))

    def next(self, node: Node, kind: str) -> Node | None:
        """The one reader of ``node``, identities aside, if it is of that kind."""
        passed: list[str] = []
        while len(node.users) == 1:
            (node,) = node.users
            step = step_of(self.net, node)
            if step is None or not self._reads_one(node):
                return None
            if node.op == "call_module" and step.kind == "unknown":
                passed.append(str(node.target))
                continue
            if step.kind != kind or (kind in ("conv", "bn") and not self.site_part(node, kind)):
                return None
            if node.op == "call_module" and kind in ("relu", "pool"):
                passed.append(str(node.target))
            self.inner += passed
            return node
        return None

    @staticmethod
    def _reads_one(node: Node) -> bool:
        return len(node.all_input_nodes) == 1
