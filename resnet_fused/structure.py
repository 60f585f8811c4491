"""How an object is fused, and whether it still is as it was when the chain was read from it.

A `Binding` lives in the object's ``__dict__``. Its structure, the classes of the modules inside, is compared at every
call, so that a child that was replaced, added or hooked later makes the block run as it was written.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .links import child, is_frozen_norm
from .spec import ChainSpec

BINDING = "_resnet_fused"
_LAYERS = frozenset((nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.Sequential))


# per container: its path, the name and class (None: no module) of its children, whether these are all
Structure = tuple[tuple[str, tuple[tuple[str, "type | None"], ...], bool], ...]


class Binding(NamedTuple):
    """How one object is fused; lives in its ``__dict__`` and is pickled with it.

    ``structure`` is what the spec was read from. It is compared at every call, so that a child that was
    replaced, added or hooked later makes the block run as it was written.
    """

    spec: ChainSpec | None
    memory: str = "speed"
    engine: str | None = None
    structure: Structure = ()


def structure_of(block: nn.Module, names: tuple[str, ...] | None = None, but: str = "") -> Structure:
    """The classes of all modules in a block but those inside ``but``, or of the direct children ``names`` alone."""
    if names is not None:
        return (("", tuple((name, _class(block._modules[name])) for name in names), False),)
    return tuple(
        (path, tuple((name, _class(m)) for name, m in container._modules.items()), True)
        for path, container in block.named_modules()
        if container._modules and not (but and f"{path}.".startswith(f"{but}."))
    )


def _class(module: nn.Module | None) -> type | None:
    return None if module is None else type(module)


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def stands_alone(module: nn.Module) -> bool:
    """Whether a module must be called itself, not run as a part of a longer chain.

    It has hooks of its own, another forward on the instance, as activation checkpointing and offloading put there, or
    was compiled by itself (``module.compile()``).
    """
    own = module.__dict__
    return hooked(module) or "forward" in own or own.get("_compiled_call_impl") is not None


def hooked_globally() -> bool:
    """Whether hooks are set on all modules at once."""
    shared = nn.modules.module
    return bool(
        shared._global_forward_hooks
        or shared._global_forward_pre_hooks
        or shared._global_backward_hooks
        or shared._global_backward_pre_hooks
    )


def _runs_norm(module: nn.Module | None) -> bool:
    """Whether the chain runs this module's batch norm."""
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_frozen_norm(module)


def _unchanged(block: nn.Module, structure: Structure) -> bool:
    """Whether a block is as it was and made of torch's own layers; what is not, `obstacle` looks at more closely."""
    for prefix, children, complete in structure:
        modules: dict[str, nn.Module | None] = (child(block, prefix) if prefix else block)._modules
        if complete and len(modules) != len(children):
            return False
        for name, kind in children:
            module = modules.get(name)
            if module is None:
                if kind is not None:
                    return False
            elif (
                type(module) is not kind
                or kind not in _LAYERS
                or module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
                or "forward" in module.__dict__
            ):
                return False
    return not hooked_globally()


def obstacle(block: nn.Module, binding: Binding) -> str | None:
    """Why a fused block must run as it was written at this moment, or None."""
    if binding.spec is None:
        return "it has no chain"
    if _unchanged(block, binding.structure):
        return None
    norms = set(binding.spec.norms())
    for prefix, children, complete in binding.structure:
        modules = (child(block, prefix) if prefix else block)._modules
        if complete and len(modules) != len(children):
            added = sorted(set(modules) ^ {name for name, _ in children})
            return f"{', '.join(added)} was added or removed; call fuse again"
        for name, kind in children:
            module = modules.get(name)
            path = f"{prefix}.{name}" if prefix else name
            if path in norms:
                if not _runs_norm(module) or (path == binding.spec.post and isinstance(module, nn.SyncBatchNorm)):
                    return f"{path} is a {type(module).__name__}, which the chain does not run"
            elif _class(module) is not kind:
                return f"{path} is now a {type(module).__name__}; call fuse again"
            if module is not None and hooked(module):
                return f"hook on {path}"
            if module is not None and "forward" in module.__dict__:
                return f"the forward of {path} was replaced on the instance"
    return "global module hook" if hooked_globally() else None
