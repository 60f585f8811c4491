"""Symbolic tracing of a block without touching it.

`replicate` copies a module tree without its hooks, every tensor replaced, so that whatever a forward
does to ``self`` happens to the copy. `record` runs `torch.fx` over such a copy and returns its graph,
or raises `UntraceableError` with the reason in words. As every use of `torch.fx`, it patches
``nn.Module.__call__`` while it runs: call it from one thread at a time.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .ambient import UntraceableError, ambient, guarded
from .links import is_frozen_norm
from .modules import Fused

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def leaf_kind(module: nn.Module) -> str | None:
    """``conv``, ``bn``, ``relu``, ``pool`` or ``identity`` for the exact classes a chain knows, else None."""
    if type(module) in LEAVES:
        return LEAVES[type(module)]
    return "bn" if is_frozen_norm(module) else None


LEAVES: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "bn",
    nn.SyncBatchNorm: "bn",
    nn.ReLU: "relu",
    nn.MaxPool2d: "pool",
    nn.Identity: "identity",
}


def is_conv_with_more(module: nn.Module) -> bool:
    """Whether it is a user's ``nn.Conv2d`` whose own forward does more than convolve: norm and activation, often."""
    cls = stock_class(module)
    return isinstance(module, nn.Conv2d) and not is_opaque(module) and cls.forward is not nn.Conv2d.forward


def is_opaque(module: nn.Module) -> bool:
    """Whether the forward is torch's own, and no plain container's: not to be traced through."""
    cls = stock_class(module)
    return cls.__module__.split(".")[0] == "torch" and cls not in _CONTAINERS


def named(path: str, module: nn.Module) -> str:
    """A module as a reason names it."""
    return f"'{path}' ({type(module).__name__})" if path else f"the {type(module).__name__} itself"


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before `fuse` swapped it; a user's subclass of a fused class is its own."""
    own = type(module)
    return own.__dict__.get("stock_class", own) if issubclass(own, Fused) else own


def replicate(root: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module tree: stock classes, no hooks, every tensor replaced by ``tensor(t)``, sharing kept.

    Unlike ``copy.deepcopy`` it needs nothing of the other attributes (process groups, locks, closures),
    which are shared; containers of modules or tensors are rebuilt.
    """
    modules = {id(m): object.__new__(stock_class(m)) for m in root.modules()}
    tensors: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return modules.get(id(value), value)
        if isinstance(value, Tensor):
            if id(value) not in tensors:
                new = tensor(value.detach())
                is_parameter = isinstance(value, nn.Parameter)
                tensors[id(value)] = nn.Parameter(new, value.requires_grad) if is_parameter else new
            return tensors[id(value)]
        if isinstance(value, types.MethodType) and id(value.__self__) in modules:
            return types.MethodType(value.__func__, modules[id(value.__self__)])
        if type(value) in (list, set):
            return type(value)(copy(v) for v in value)
        if type(value) is tuple:
            return tuple(copy(v) for v in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((k, copy(v)) for k, v in value.items())
        return value

    for old in root.modules():
        state = modules[id(old)].__dict__
        for key, value in old.__dict__.items():
            state[key] = OrderedDict() if key in _HOOK_TABLES else copy(value)
    return modules[id(root)]


_HOOK_TABLES = frozenset(
    key for key, value in nn.Module().__dict__.items() if "hook" in key and isinstance(value, dict)
)


class _Proxy(torch.fx.Proxy):
    """A proxy that tells ``a += b`` from ``a + b``: the dtype rule differs."""

    def __iadd__(self, other: Any) -> torch.fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def numel(self) -> torch.fx.Proxy:
        return _Count(self.tracer.create_proxy("call_method", "numel", (self,), {}).node, self.tracer)


class _Count(_Proxy):
    """A number of elements: never zero, as a chain takes no empty tensor (`Run.takes`)."""

    def __eq__(self, other: object) -> Any:
        return False if type(other) is int and other == 0 else super().__eq__(other)

    def __gt__(self, other: object) -> Any:
        return True if type(other) is int and other == 0 else operator.gt(_Proxy(self.node, self.tracer), other)  # type: ignore[arg-type]

    __hash__ = _Proxy.__hash__


class _Recorder(torch.fx.Tracer):
    """`torch.fx.Tracer` whose leaves are the classes a chain knows, and the paths ``leaves``; with one input."""

    def __init__(self, leaves: frozenset[str], constants: bool = False) -> None:
        super().__init__()
        self.leaves, self.constants = leaves, constants
        self.called: list[str] = []
        self.stack: list[str] = []
        self.ambient = ambient()

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves:
            return True
        if is_conv_with_more(m):
            return False
        return leaf_kind(m) is not None or isinstance(m, tuple(LEAVES)) or is_opaque(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # fx's own `forward` would fire global module hooks; m.forward does not
        try:
            path = self.path_of_module(m)
        except NameError:
            raise UntraceableError(f"its forward calls a {type(m).__name__} that is not its submodule") from None
        self.called.append(path)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        self.stack.append(path)
        result = m.forward(*args, **kwargs)
        self.stack.pop()
        return result

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if ambient() != self.ambient:
            raise UntraceableError(
                f"{self.where()} switches autocast, gradient mode or saved-tensor hooks, which a chain would not do"
            )
        node = super().create_node(kind, *args, **kwargs)
        node.meta["where"] = self.where()
        return node

    def create_arg(self, a: Any) -> Any:
        if not self.constants and isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise UntraceableError(f"{self.where()} computes with a tensor of its own")
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if not parameters or parameters[0].kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY):
            raise UntraceableError("its forward has no first positional argument")
        for extra in parameters[1:]:
            if extra.default is inspect.Parameter.empty and extra.kind not in variadic:
                raise UntraceableError(f"its forward needs a second input '{extra.name}'")
        return root_fn, [self.root, self.create_proxy("placeholder", parameters[0].name, (), {})]

    def where(self) -> str:
        """Whose forward is being traced."""
        path = self.stack[-1] if self.stack else ""
        return named(path, self.root.get_submodule(path)) if path else "its forward"


def _attributes(root: nn.Module) -> dict[str, list[tuple[object, int]]]:
    """Every attribute in a module tree with what it holds, and how often each tensor was written to."""
    found = {}
    for path, module in root.named_modules():
        for key, value in module.__dict__.items():
            inside = [*value, *value.values()] if isinstance(value, dict) else value
            objects = [value, *inside] if isinstance(inside, (list, set)) else [value]
            name = f"{path}.{key}" if path else key
            found[name] = [(o, o._version if isinstance(o, Tensor) else 0) for o in objects]
    return found


def _first_change(
    before: dict[str, list[tuple[object, int]]], after: dict[str, list[tuple[object, int]]]
) -> str | None:
    for name, held in after.items():
        old = before.get(name, [])
        if len(old) != len(held) or any(a is not b or m != n for (a, m), (b, n) in zip(old, held, strict=True)):
            return name
    return None


def _trace(recorder: _Recorder, copy: nn.Module) -> torch.fx.Graph:
    """The graph; whatever goes wrong becomes an `UntraceableError`."""
    try:
        return recorder.trace(copy)
    except UntraceableError:
        raise
    except torch.fx.proxy.TraceError:
        raise UntraceableError(f"{recorder.where()} has data-dependent control flow") from None
    except Exception as error:  # user code may raise anything; it becomes the reason
        lines = str(error).strip().splitlines() or [""]
        detail = f"{type(error).__name__}: {lines[0]}"[:160]
        raise UntraceableError(f"{recorder.where()} cannot be traced: {detail}") from None


def record_partly(
    copy: nn.Module, training: bool, leaves: frozenset[str]
) -> tuple[torch.fx.Graph, tuple[str, ...], str | None]:
    """What of a network's forward can be recorded: the graph, the modules called, and why it ends early, or None.

    Args:
        copy: made by `replicate`.
        leaves: the paths of the modules that are not looked into.
    """
    for module in copy.modules():
        module.training = training
    reason: str | None = None
    try:
        with guarded(training):
            recorder = _Recorder(leaves, constants=True)
            recorder.graph = torch.fx.Graph()
            _trace(recorder, copy)
    except UntraceableError as error:
        reason = str(error)
    return recorder.graph, tuple(dict.fromkeys(recorder.called)), reason


def record(
    copy: nn.Module, training: bool, leaves: frozenset[str] = frozenset()
) -> tuple[torch.fx.Graph, tuple[str, ...]]:
    """Trace a copy made by `replicate`: its graph, and the paths of the modules called, in order.

    Gradient mode and autocast are on when ``training`` and off otherwise, so that a forward that sets
    one of them itself is seen in one of the two.

    Args:
        leaves: the paths of modules that are not looked into.

    Raises:
        UntraceableError: the forward cannot be recorded, or the record would not be the whole truth.
    """
    for module in copy.modules():
        module.training = training
    with guarded(training):
        recorder = _Recorder(leaves)
        before = _attributes(copy)
        graph = _trace(recorder, copy)
        changed = _first_change(before, _attributes(copy))
    if changed is not None:
        raise UntraceableError(f"its forward changes the attribute '{changed}', which a chain would not do")
    return graph, tuple(dict.fromkeys(recorder.called))
