"""Blocks whose author names the chain, because tracing their forward cannot find it.

A forward with data-dependent control flow, or one that prints or counts, is no graph. `register_block` takes its
convolutions and batch norms by name instead. What is named is not believed: `fuse` compares numbers all the same, and
leaves a block alone that computes something else.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from torch import nn

from .eager_blocks import PadShortcut
from .matching import check
from .spec import ChainSpec, ShortcutSpec, SiteSpec
from .tracing import leaf_kind, stock_class

Shortcut = str | tuple[str, str] | Literal[False] | None
Block = TypeVar("Block", bound=type[nn.Module])
_ADDS = ("outplace", "inplace")
_WORDS = {"conv": "an nn.Conv2d", "bn": "a batch norm"}


@dataclasses.dataclass(frozen=True)
class Registration:
    """What `register_block` was told about a class."""

    conv: tuple[str, ...]
    bn: tuple[str, ...]
    shortcut: Shortcut
    relu_last: bool
    add: str
    post: str | None
    shortcut_first: bool


_registered: weakref.WeakKeyDictionary[type[nn.Module], Registration] = weakref.WeakKeyDictionary()


def register_block(
    *,
    conv: Sequence[str],
    bn: Sequence[str],
    shortcut: Shortcut = None,
    relu_last: bool = True,
    add: str = "outplace",
    post: str | None = None,
    shortcut_first: bool = False,
) -> Callable[[Block], Block]:
    """Class decorator: the chain that the class's forward computes, by the names of its modules.

    For blocks that `fuse` cannot read by itself. It still proves every one by numbers before it swaps it, on random
    inputs; what else the forward does (prints, counters, branches that the proof does not take) no longer happens in a
    fused block. Subclasses inherit the registration while they inherit the forward.

    Args:
        conv: paths of the convolutions in order, each followed by its batch norm and, but for the last, a ReLU.
        bn: paths of the batch norms, as many; one may be named several times.
        shortcut: what is added to the last batch norm's output: None, or the path of a module that is None, an
            identity, a convolution, or a convolution and a batch norm; a pair of paths, of such a convolution and its
            batch norm; False for nothing.
        relu_last: whether a ReLU follows the add, or without a shortcut the last batch norm.
        add: ``"outplace"`` for ``out + shortcut``, ``"inplace"`` for ``out += shortcut``.
        post: path of a batch norm between the add and that ReLU, or None.
        shortcut_first: the shortcut's batch norm is one of the main path's, and is used before it.

    Raises:
        TypeError: the class is no ``nn.Module``, or a name no string.
        ValueError: no convolution, another number of batch norms, or an unknown ``add``. `fuse` and `explain` raise it
            for a module that an instance does not have.
    """
    names: dict[str, tuple[str, ...]] = {}
    for argument, value in (("conv", conv), ("bn", bn)):
        if isinstance(value, str) or not all(isinstance(path, str) for path in value):
            raise TypeError(f"register_block: {argument}: expected a sequence of module paths, got {value!r}")
        names[argument] = tuple(value)
    if not names["conv"]:
        raise ValueError("register_block: conv: expected at least one module path, got none")
    if len(names["bn"]) != len(names["conv"]):
        count = len(names["conv"])
        raise ValueError(
            f"register_block: bn: expected {count} module paths, one for each conv, got {len(names['bn'])}"
        )
    if not _is_shortcut(shortcut):
        raise TypeError(f"register_block: shortcut: expected a path, a pair of paths, None or False, got {shortcut!r}")
    if add not in _ADDS:
        raise ValueError(f"register_block: add: expected one of {_ADDS}, got {add!r}")
    if shortcut is False and (post is not None or shortcut_first):
        raise ValueError("register_block: shortcut: expected one beside post or shortcut_first, got False")
    told = Registration(names["conv"], names["bn"], shortcut, relu_last, add, post, shortcut_first)

    def register(cls: Block) -> Block:
        if not isinstance(cls, type) or not issubclass(cls, nn.Module):
            raise TypeError(f"register_block: expected a subclass of torch.nn.Module, got {cls!r}")
        _registered[cls] = told
        return cls

    return register


def _is_shortcut(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2 and all(isinstance(path, str) for path in value)
    return value is None or value is False or isinstance(value, str)


def registration(module: nn.Module) -> Registration | None:
    """What was registered for the class that gives a module its forward, or None."""
    cls: Any = stock_class(module)
    for base in cls.__mro__:
        if base in _registered:
            return _registered[base] if base.forward is cls.forward else None
    return None


def registered_chain(module: nn.Module, told: Registration) -> ChainSpec:
    """The chain of an instance of a registered class.

    Raises:
        ValueError: it does not have a module that is named, or that module is of another kind.
        MismatchError: channels or sizes do not fit.
    """
    for argument in ("conv", "bn"):
        for path in getattr(told, argument):
            _expect(module, argument, path, argument)
    if told.post is not None:
        _expect(module, "post", told.post, "bn")
    shortcut = _shortcut(module, told)
    last = len(told.conv) - 1
    sites = tuple(
        SiteSpec(conv, bn, i < last or (shortcut.kind == "none" and told.relu_last))
        for i, (conv, bn) in enumerate(zip(told.conv, told.bn, strict=True))
    )
    spec = ChainSpec(sites, shortcut, told.relu_last, told.add == "inplace", post=told.post)
    check(spec, module)
    own = set(spec.paths())
    inner = tuple(path for path, _ in module.named_modules() if path and path not in own)
    return dataclasses.replace(spec, inner=inner)


def _find(module: nn.Module, argument: str, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            names = ", ".join(name for name, _ in module.named_children())
            raise ValueError(
                f"register_block: {argument}: expected the path of a module of {stock_class(module).__name__} "
                f"(it has {names}), got {path!r}"
            )
        found = getattr(found, name)
    return found


def _expect(module: nn.Module, argument: str, path: str, kind: str) -> None:
    found = _find(module, argument, path)
    if not isinstance(found, nn.Module) or leaf_kind(found) != kind:
        raise ValueError(
            f"register_block: {argument}: expected {_WORDS[kind]} at {path!r} of {stock_class(module).__name__}, "
            f"got {type(found).__name__}"
        )


def _shortcut(module: nn.Module, told: Registration) -> ShortcutSpec:
    given = told.shortcut
    if given is False:
        return ShortcutSpec()
    if given is None:
        return ShortcutSpec("identity")
    if isinstance(given, tuple):
        for path, kind in zip(given, ("conv", "bn"), strict=True):
            _expect(module, "shortcut", path, kind)
        return ShortcutSpec("projection", SiteSpec(given[0], given[1], False), first=told.shortcut_first)
    found = _find(module, "shortcut", given)
    if isinstance(found, PadShortcut):
        return ShortcutSpec("pad", None, found.stride, found.channel_offset)
    leaves = [(f"{given}.{path}".rstrip("."), leaf_kind(m)) for path, m in _leaves(found)]
    kinds = [kind for _, kind in leaves]
    if not kinds:
        return ShortcutSpec("identity")
    if kinds not in (["conv"], ["conv", "bn"]):
        raise ValueError(
            f"register_block: shortcut: expected a convolution, a convolution and a batch norm, or an identity at "
            f"{given!r} of {stock_class(module).__name__}, got {type(found).__name__}"
        )
    bn = leaves[1][0] if len(leaves) > 1 else None
    return ShortcutSpec("projection", SiteSpec(leaves[0][0], bn, False), first=told.shortcut_first and bn is not None)


def _leaves(module: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """What a shortcut is made of: everything in it but identities and containers."""
    if module is None or type(module) is nn.Identity:
        return []
    found = [(path, m) for path, m in module.named_modules() if leaf_kind(m) is not None or not list(m.children())]
    return [(path, m) for path, m in found if leaf_kind(m) != "identity" and type(m) is not nn.Sequential]
