"""Recognise user-written blocks that compute a chain.

A block is traced on a copy (`tracing`), the graph is turned into steps (`steps`), and the steps are
matched to a `ChainSpec` (`matching`). What does not match is refused with a reason that names the
thing. A match says that the *structure* is a chain; `probe` then proves the numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from .links import is_frozen_norm
from .matching import MismatchError, match
from .register import registered_chain, registration
from .spec import ChainSpec, SiteSpec
from .steps import translate
from .tracing import (
    UntraceableError,
    is_conv_with_more,
    is_opaque,
    leaf_kind,
    named,
    record,
    replicate,
    stock_class,
)

MAX_CONVS = 8
MAX_MODULES = 64


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a module is not taken for a chain, in words."""

    reason: str


def recognise(module: nn.Module) -> ChainSpec | Refusal:
    """The chain that ``module.forward`` computes, or why it is not one.

    Neither the module, its tensors, its hooks nor any random generator is touched: it is traced on a
    copy, in training and in eval mode.

    Raises:
        TypeError: ``module`` is not an ``nn.Module``.
        ValueError: its class is registered (`register.register_block`) with a module that it does not have.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"recognise: module: expected an nn.Module, got {type(module).__name__}")
    reason = _structure_obstacle(module)
    if reason is not None:
        return Refusal(reason)
    told = registration(module)
    if told is not None:
        try:
            return registered_chain(module, told)
        except MismatchError as error:
            return Refusal(str(error))
    with torch.inference_mode(False):  # tensors made in it do not count how often they are written to
        copy = replicate(module, lambda t: torch.empty_like(t, device="meta"))
    try:
        train, called = record(copy, True)
        evaluation, _ = record(copy, False)
        differs = _first_difference(train, evaluation)
        if differs is not None:
            return Refusal(f"{differs} does different things in training and in eval mode")
    except UntraceableError as error:
        return Refusal(str(error))
    try:
        spec = match(translate(copy, train), module)
        return dataclasses.replace(spec, inner=_inner(module, spec, called))
    except (UntraceableError, MismatchError) as error:
        branches = (_around(module, copy, name) for name, child in module.named_children() if _does_something(child))
        chains = [found for found in branches if found is not None]
        return max(chains, key=lambda found: len(found.sites)) if chains else Refusal(str(error))


def _around(module: nn.Module, copy: nn.Module, branch: str) -> ChainSpec | None:
    """The chain around the child ``branch``, taken for the block's shortcut; that it can be recorded is known."""
    leaves = frozenset((branch,))
    try:
        graph, called = record(copy, True, leaves)
        spec = match(translate(copy, graph, leaves), module)
    except (UntraceableError, MismatchError):
        return None
    apart = _stands_apart(module, spec, branch, graph)
    return dataclasses.replace(spec, inner=_inner(module, spec, called)) if apart else None


def _does_something(child: nn.Module) -> bool:
    """Whether a child is more than a convolution, a batch norm, an activation, or nothing at all."""
    return leaf_kind(child) is None and not (isinstance(child, nn.Sequential) and not len(child))


def _first_difference(train: torch.fx.Graph, evaluation: torch.fx.Graph) -> str | None:
    """Whose forward the two modes do not share, or None."""
    for a, b in itertools.zip_longest(train.nodes, evaluation.nodes):
        if a is None or b is None or _signature(a) != _signature(b):
            places = [str(n.meta["where"]) for n in (a, b) if n is not None and "where" in n.meta]
            return next((place for place in places if place != "its forward"), "its forward")
    return None


def _signature(node: torch.fx.Node) -> tuple[object, ...]:
    return node.op, node.target, str(node.args), str(node.kwargs)


def _stands_apart(module: nn.Module, spec: ChainSpec, branch: str, graph: torch.fx.Graph) -> bool:
    """Whether a branch is the shortcut, called once, and shares no module with the main path."""
    inside = set(module.get_submodule(branch).modules())
    paths = (spec.post, *(path for site in spec.sites for path in (site.conv, site.bn)))
    main = {module.get_submodule(path) for path in paths if path}
    return spec.shortcut.path == branch and not inside & main and sum(n.target == branch for n in graph.nodes) == 1


def _structure_obstacle(module: nn.Module) -> str | None:
    """What can be seen without tracing."""
    modules = list(module.named_modules())
    kinds = Counter("conv" if is_conv_with_more(m) else leaf_kind(m) for _, m in modules)
    if kinds["conv"] > MAX_CONVS or len(modules) > MAX_MODULES:
        return f"it is larger than a block: {kinds['conv']} convolutions in {len(modules)} modules"
    for path, m in modules:
        reason = module_obstacle(m)
        if reason is not None:
            return f"{named(path, m)} {reason}"
    for kind, exact in (("conv", "nn.Conv2d"), ("bn", "nn.BatchNorm2d")):
        if not kinds[kind]:
            odd = next((named(path, m) for path, m in modules if _family(m) == kind), None)
            return f"{odd} is not exactly {exact}" if odd else "it has no convolution followed by a batch norm"
    return f"{named('', module)} is torch's own wrapper, not a block" if is_opaque(module) else None


def _family(module: nn.Module) -> str | None:
    """``conv`` or ``bn`` for anything a user would call that, a chain or not."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "bn" if isinstance(module, nn.modules.batchnorm._BatchNorm) or leaf_kind(module) == "bn" else None


def _families(module: nn.Module) -> Counter[str | None]:
    return Counter(_family(m) for m in module.modules())


def module_obstacle(m: nn.Module) -> str | None:
    """Why one module could do something its class's forward does not show."""
    kind = "conv" if is_conv_with_more(m) else leaf_kind(m)
    if parametrize.is_parametrized(m):
        return "is parametrised"
    if isinstance(m, torch.jit.ScriptModule):
        return "is a TorchScript module"
    if type(m).__call__ is not nn.Module.__call__ or type(m)._call_impl is not nn.Module._call_impl:
        return "overrides __call__"
    if "forward" in m.__dict__:
        return "has its forward replaced on the instance"
    if m._compiled_call_impl is not None:
        return "is compiled on its own"
    if any(p is not None and type(p) is not nn.Parameter for p in m._parameters.values()):
        return "has a parameter that is not a plain tensor"
    if kind == "conv":
        return _conv_obstacle(m)  # type: ignore[arg-type]
    if kind == "bn" and not is_frozen_norm(m) and set(m._parameters) != {"weight", "bias"}:
        return "has parameters other than weight and bias"
    return None


def _conv_obstacle(conv: nn.Conv2d) -> str | None:
    if set(conv._parameters) != {"weight", "bias"} or conv._parameters["weight"] is None or conv._buffers:
        return "computes its weight from others (weight norm, spectral norm or pruning)"
    if not conv.weight.is_floating_point():
        return f"has a {conv.weight.dtype} weight"
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode}, not with zeros"
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same" and (any(s % 2 for s in spans) or set(conv.stride) != {1}):
        return "pads unevenly ('same' with an even kernel)"
    return None


def _inner(module: nn.Module, spec: ChainSpec, called: tuple[str, ...]) -> tuple[str, ...]:
    """The called modules that are no site's, and the containers on the way to any called one."""
    wanted = {".".join(path.split(".")[:n]) for path in called for n in range(1, path.count(".") + 2)}
    own = {spec.post, *(path for site in spec.site_specs() for path in (site.conv, site.bn))}
    return tuple(path for path, _ in module.named_modules() if path in wanted - own)


def find_chains(model: nn.Module) -> Iterator[tuple[str, nn.Module, ChainSpec | Refusal]]:
    """Walk a model from the top: every chain, and every block that looks like one and is not.

    A chain is not searched further, but for a shortcut that is a module. A refusal is reported for the smallest
    modules with a forward of their own that hold a convolution and a batch norm no chain covers, not for stages and
    models around them, and before the chains inside it.

    Yields:
        ``(name, module, result)``, names as in ``model.named_modules()``.
    """
    yield from _walk("", model, set())


def _walk(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module, ChainSpec | Refusal]]:
    if module in seen:
        return
    seen.add(module)
    kinds = _families(module)
    if not kinds["conv"] or not kinds["bn"]:
        return
    found = recognise(module)
    if isinstance(found, ChainSpec) and not _is_wrapper(module, found):
        yield name, module, found
        if found.shortcut.path:
            branch = found.shortcut.path
            yield from _walk(f"{name}.{branch}".lstrip("."), module.get_submodule(branch), seen)
        return
    inside = [
        entry for child, m in module.named_children() for entry in _walk(f"{name}.{child}" if name else child, m, seen)
    ]
    if isinstance(found, Refusal) and _is_block(module, kinds["conv"]) and _has_loose(module, inside):
        yield name, module, found
    yield from inside


def _is_wrapper(module: nn.Module, spec: ChainSpec) -> bool:
    """Whether one child alone is the same chain, as in a stage of one block."""
    child = spec.sites[0].conv.partition(".")[0]
    if any(path.partition(".")[0] != child or path == child for path in (s.conv for s in spec.site_specs())):
        return False
    inner = recognise(module.get_submodule(child))
    return isinstance(inner, ChainSpec) and _below(child, inner) == dataclasses.replace(spec, inner=())


def _below(prefix: str, spec: ChainSpec) -> ChainSpec:
    """A spec as seen from the parent; without ``inner``."""

    def site(s: SiteSpec) -> SiteSpec:
        return SiteSpec(f"{prefix}.{s.conv}", f"{prefix}.{s.bn}" if s.bn else None, s.relu)

    shortcut = spec.shortcut
    if shortcut.site is not None:
        shortcut = dataclasses.replace(shortcut, site=site(shortcut.site))
    if shortcut.path:
        shortcut = dataclasses.replace(shortcut, path=f"{prefix}.{shortcut.path}")
    post = None if spec.post is None else f"{prefix}.{spec.post}"
    return dataclasses.replace(spec, sites=tuple(site(s) for s in spec.sites), shortcut=shortcut, post=post, inner=())


def _is_block(module: nn.Module, convs: int) -> bool:
    """Whether a user would call it a block: a forward of its own, and no smaller block inside."""
    if convs > MAX_CONVS or not _has_forward(module):
        return False
    return not any(
        _has_forward(m) and {"conv", "bn"} <= _families(m).keys() for m in module.modules() if m is not module
    )


def _has_forward(module: nn.Module) -> bool:
    """Whether the module is neither a leaf nor a plain container."""
    cls = stock_class(module)
    return leaf_kind(module) is None and cls.forward not in (nn.Sequential.forward, nn.Module.forward)


def _has_loose(module: nn.Module, inside: list[tuple[str, nn.Module, ChainSpec | Refusal]]) -> bool:
    """Whether a convolution and a batch norm are left that no entry inside covers."""
    covered = {m for _, entry, _ in inside for m in entry.modules()}
    return {"conv", "bn"} <= {_family(m) for m in module.modules() if m not in covered}
