"""Surgery: `fuse` swaps the classes of blocks, stages and known trunks in place; `unfuse` puts them back.

A block is recognised by tracing its forward, and proven by a numeric probe on a deep copy before its
class is swapped, unless its forward is torchvision's or ours, which the tests prove. Nothing else about
the model changes: no module, parameter, buffer or key is added, removed or replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from . import eager, eager_blocks, engines
from .folded import BY_FOLD, FOLDED
from .links import is_frozen_norm
from .modules import (
    NOTICE,
    STEM,
    Fused,
    FusedBlock,
    FusedStage,
    FusedTrunk,
    fused_class,
    in_order,
    is_sequence,
    is_swapped,
    stage_names,
)
from .nets import FusedNet, NetBinding, RunBinding, bind_run
from .probe import probe
from .recognise import Refusal, find_chains
from .register import registration
from .runs import Found, find_runs
from .spec import ChainSpec, PoolSpec, SiteSpec
from .structure import BINDING, Binding, structure_of

REFUSAL = "_resnet_fused_refusal"
_KEYS = (BINDING, NOTICE, REFUSAL, FOLDED, BY_FOLD)
MEMORY_MODES = ("speed", "lean", "min")
Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, memory: str = "speed", engine: str | None = None) -> Model:
    """Make every residual or conv-BN-ReLU block of ``model`` run fused; returns ``model`` itself.

    Args:
        model: any module; what is not a recognised block stays as it is, and `explain` says why.
        memory: what is kept for backward: ``"speed"`` (raw convolution outputs and block inputs),
            ``"lean"`` (the last 1x1 of a bottleneck is rebuilt in backward), ``"min"`` (block inputs).
        engine: None picks by device; ``"cpu"`` or ``"reference"`` asks for one.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: unknown ``memory`` or ``engine``, an engine that cannot run here, a model whose
            parameters are already sharded by ``fully_shard`` (fuse first, then shard), or a block whose
            class is registered with modules that it does not have.

    Equivalent to: the model as it was, in output, every gradient and every buffer, up to rounding.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model: expected a torch.nn.Module, got {type(model).__name__}")
    if memory not in MEMORY_MODES:
        raise ValueError(f"fuse: memory: expected one of {MEMORY_MODES}, got {memory!r}")
    engines.check_name(engine)
    for module in model.modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            raise ValueError("fuse: model: already sharded by fully_shard; call fuse first, then fully_shard")
    proven: dict[Any, str | None] = {}
    blocks = list(find_chains(model))
    for _, block, found in reversed(blocks):  # a shortcut's own blocks before the block around it
        block.__dict__.pop(REFUSAL, None)
        if isinstance(found, Refusal):
            continue
        binding = Binding(found, memory, engine, structure_of(block, but=found.shortcut.path))
        known = _known(block) and not found.is_literal() and registration(block) is None
        reason = None if known else _prove(block, binding, proven)
        if reason is None:
            _swap(block, FusedBlock, binding)
        else:
            block.__dict__[REFUSAL] = reason
    _fuse_runs(model, memory, engine)
    _fuse_nets(model, [name for name, _, _ in blocks], engine, proven)
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse` exactly: stock classes, and nothing of ours left on any object; returns ``model``.

    A subclass of our own modules keeps its class, there is no other, and runs as it was written.
    """
    for module in model.modules():
        restore(module)
    return model


@contextlib.contextmanager
def fused(model: Model, *, memory: str = "speed", engine: str | None = None) -> Iterator[Model]:
    """`fuse` for the duration of a ``with`` block; afterwards every object is as it was before."""
    before = [(m, type(m), {k: m.__dict__[k] for k in _KEYS if k in m.__dict__}) for m in model.modules()]
    try:
        yield fuse(model, memory=memory, engine=engine)
    finally:
        for module, cls, state in before:
            restore(module)
            if type(module) is not cls:
                module.__class__ = cls
            module.__dict__.update(state)


def restore(module: nn.Module) -> None:
    """Give one object its stock class, with nothing of ours left on it."""
    if isinstance(module, Fused) and is_swapped(module):
        module.__class__ = _stock_class(module)
    for key in _KEYS:
        module.__dict__.pop(key, None)


def _swap(module: nn.Module, mixin: type, binding: Binding | NetBinding) -> None:
    if not isinstance(module, mixin):
        module.__class__ = fused_class(type(module), mixin)
    module.__dict__[BINDING] = binding
    module.__dict__.pop(BY_FOLD, None)  # fuse was asked for, whatever fold does with it


def _known_forwards() -> list[Any]:
    known: list[Any] = [
        eager_blocks.BasicBlock,
        eager_blocks.Bottleneck,
        eager_blocks.PlainBlock,
        eager_blocks.ConvBNReLU,
    ]
    known.append(eager_blocks.Stem)
    torchvision = sys.modules.get("torchvision.models.resnet")
    if torchvision is not None:
        known += [torchvision.BasicBlock, torchvision.Bottleneck]
    return [cls.forward for cls in known]


def _stock_class(module: nn.Module) -> Any:
    return module.stock_class if isinstance(module, Fused) else type(module)


def _known(block: nn.Module) -> bool:
    """Whether the block's forward is one the tests of this package prove; matched by the function itself."""
    forward = _stock_class(block).forward
    if "forward" in block.__dict__ or not all(_known_norm(m) for m in block.modules() if is_frozen_norm(m)):
        return False
    return any(forward is known for known in _known_forwards())


def _known_norm(norm: nn.Module) -> bool:
    """Whether it is torch's batch norm or torchvision's frozen one; any other frozen one is proven by the probe."""
    misc = sys.modules.get("torchvision.ops.misc")
    return isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) or (
        misc is not None and type(norm) is getattr(misc, "FrozenBatchNorm2d", None)
    )


def _prove(block: nn.Module, binding: Binding, proven: dict[Any, str | None]) -> str | None:
    """Probe a block, once for all blocks of one class, spec and geometry; the reason if it is not equal."""
    geometry = tuple((type(m).__name__, m.extra_repr(), m.training) for m in block.modules() if not list(m.children()))
    key = (_stock_class(block), binding, geometry)
    if "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    if key not in proven:
        proven[key] = probe(block, lambda twin: _probe_twin(twin, binding), binding.spec)  # type: ignore[arg-type]
    return proven[key]


def _probe_twin(twin: nn.Module, binding: Binding) -> nn.Module:
    branch = binding.spec.shortcut.path  # type: ignore[union-attr]
    _swap(twin, FusedBlock, binding._replace(structure=structure_of(twin, but=branch)))
    return twin


def _fuse_runs(model: nn.Module, memory: str, engine: str | None) -> None:
    """Swap stages (Sequentials with neighbouring fused blocks) and known trunks."""
    for module in list(model.modules()):
        if is_sequence(module):
            if _neighbours(list(in_order(module))):
                _swap(module, FusedStage, Binding(None, memory, engine))
        elif _is_trunk(module) and any(_holds_block(module, name) for name in stage_names(module)):
            _swap(module, FusedTrunk, _stem_binding(module, memory, engine))


def loose_runs(model: nn.Module, blocks: list[str]) -> list[Found]:
    """`find_runs`, known networks left out: their stems are fused with their stages."""
    return find_runs(model, blocks, _is_trunk)


def _fuse_nets(model: nn.Module, blocks: list[str], engine: str | None, proven: dict[Any, str | None]) -> None:
    """Swap networks with loose runs; those of one network share its binding."""
    held: dict[nn.Module, list[RunBinding]] = {}
    for _, net, found in loose_runs(model, blocks):
        if isinstance(found, Refusal):
            continue
        net.__dict__.pop(REFUSAL, None)
        if isinstance(net, FusedStage) and _neighbours(net):
            net.__dict__[REFUSAL] = "its container runs the blocks next to it as one chain"
            continue
        reason = _prove_run(net, found, engine, proven)
        if reason is None:
            held.setdefault(net, []).append(bind_run(net, found, engine))
        else:
            net.__dict__[REFUSAL] = reason
    for net, runs in held.items():
        restore(net)
        _swap(net, FusedNet, NetBinding(tuple(runs), engine))


def _prove_run(net: nn.Module, spec: ChainSpec, engine: str | None, proven: dict[Any, str | None]) -> str | None:
    """Probe a run by itself; the network's forward is not part of the proof, as it runs as it was written."""
    parts: list[nn.Module] = []
    sites: list[SiteSpec] = []
    for site in spec.sites:
        sites.append(SiteSpec(str(len(parts)), str(len(parts) + 1), site.relu))
        parts += [net.get_submodule(site.conv), net.get_submodule(site.bn or ""), *([nn.ReLU()] if site.relu else [])]
    if spec.pool is not None:
        parts.append(nn.MaxPool2d(*dataclasses.astuple(spec.pool)))
    alone = ChainSpec(tuple(sites), relu=spec.relu, pool=spec.pool)
    key = (alone, engine, tuple((m.extra_repr(), m.training) for m in parts))
    if key not in proven:
        proven[key] = probe(nn.Sequential(*parts), lambda twin: _probe_net(twin, alone, engine), alone)
    return proven[key]


def _probe_net(twin: nn.Module, spec: ChainSpec, engine: str | None) -> nn.Module:
    _swap(twin, FusedNet, NetBinding((bind_run(twin, spec, engine),), engine))
    return twin


def _neighbours(modules: Any) -> bool:
    """Whether two blocks follow each other."""
    return any(a and b for a, b in itertools.pairwise(isinstance(m, FusedBlock) for m in modules))


def _holds_block(model: nn.Module, name: str) -> bool:
    """Whether a stage is a block, as a plain net's is, or has one."""
    stage = getattr(model, name)
    return any(isinstance(m, FusedBlock) for m in (stage, *stage.children()))


def _is_trunk(module: nn.Module) -> bool:
    """Whether the model's forward is torchvision's ResNet's or ours; matched by the functions themselves."""
    known = [eager.ResNet]
    torchvision = sys.modules.get("torchvision.models.resnet")
    if torchvision is not None:
        known.append(torchvision.ResNet)
    if isinstance(module, FusedTrunk) or "_forward_impl" in module.__dict__:
        return isinstance(module, FusedTrunk)
    cls: Any = type(module)
    return any(
        cls.forward is k.forward and cls._forward_impl is k._forward_impl for k in known if isinstance(module, k)
    )


def _stem_binding(model: nn.Module, memory: str, engine: str | None) -> Binding:
    return Binding(_stem_spec(model), memory, engine, structure_of(model, STEM))


def _stem_spec(model: Any) -> ChainSpec | None:
    """The stem of a known trunk as a chain, or None where it is not one."""
    conv, bn, relu, pool = (getattr(model, name) for name in STEM)
    if type(conv) is not nn.Conv2d or not _known_norm(bn) or conv.padding_mode != "zeros":
        return None
    if type(relu) not in (nn.ReLU, nn.Identity) or type(pool) not in (nn.MaxPool2d, nn.Identity):
        return None
    window: PoolSpec | None = None
    if type(pool) is nn.MaxPool2d:
        if pool.ceil_mode or pool.return_indices or _pair(pool.dilation) != (1, 1):
            return None
        window = PoolSpec(_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding))
    active = type(relu) is nn.ReLU
    return ChainSpec((SiteSpec("conv1", "bn1", active),), relu=active, pool=window, inner=("relu", "maxpool"))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
