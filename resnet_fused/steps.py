"""The graph of a traced block as steps of the chain's vocabulary, with in-place operations resolved.

`torch.fx` records ``out.relu_()`` as an operation whose result nobody needs to use; here every later
reader of ``out`` reads the step that changed it. What is outside the vocabulary raises `UntraceableError`
naming the module or the function.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from .eager_blocks import pad_shortcut
from .spec import Pair, PoolSpec
from .tracing import UntraceableError, is_conv_with_more, leaf_kind, named

_SHAPE_METHODS = ("size", "dim", "numel", "ndimension")
_VIEWS = ("input", "subsample")


@dataclasses.dataclass(eq=False)
class Step:
    """One operation.

    ``kind``: ``input``, ``conv``, ``bn``, ``relu``, ``add``, ``pool``, ``copy``, or the two halves of an
    option A shortcut, ``subsample`` (by ``stride``) and ``pad`` (``channels`` zero channels before and
    after, or as many after as make ``total``).
    """

    kind: str
    inputs: tuple[Step, ...] = ()
    path: str = ""
    inplace: bool = False
    pool: PoolSpec | None = None
    stride: int = 1
    channels: Pair = (0, 0)
    total: int | None = None

    def source(self, index: int = 0) -> Step:
        """What the step reads, looking through copies."""
        step = self.inputs[index]
        while step.kind == "copy":
            step = step.inputs[0]
        return step

    def __str__(self) -> str:
        if self.path and self.kind in _WORDS:
            return f"{_WORDS[self.kind]} '{self.path}'"
        return _PHRASES[self.kind]


_WORDS = {"conv": "convolution", "bn": "batch norm", "module": "module"}
_PHRASES = {
    "input": "the block's input",
    "module": "a module",
    "relu": "a ReLU",
    "add": "an add",
    "pool": "a max pool",
    "copy": "a copy",
    "subsample": "a slice",
    "pad": "a zero padding",
}


@dataclasses.dataclass
class Steps:
    """Every step in order of execution, and the one whose result the block returns."""

    all: list[Step]
    result: Step

    def reachable(self) -> set[Step]:
        """The steps the result depends on."""
        found: set[Step] = set()
        pending = [self.result]
        while pending:
            step = pending.pop()
            if step not in found:
                found.add(step)
                pending.extend(step.inputs)
        return found


def translate(root: nn.Module, graph: Graph, leaves: frozenset[str] = frozenset()) -> Steps:
    """The steps of a recorded graph; ``leaves`` are the paths of modules that were not looked into.

    Raises:
        UntraceableError: an operation is outside the vocabulary.
    """
    return _Translator(root, leaves).run(graph)


def step_of(root: nn.Module, node: Node) -> Step | None:
    """One node of a recorded graph by itself; what it reads, and what an identity returns, is of kind ``unknown``.

    None where the node is outside the vocabulary.
    """
    translator = _Translator(root)
    translator.values = {source: Step("unknown") for source in node.all_input_nodes}
    try:
        return translator.step(node)
    except UntraceableError:
        return None


class _Translator:
    def __init__(self, root: nn.Module, leaves: frozenset[str] = frozenset()) -> None:
        self.root, self.leaves = root, leaves
        self.steps: list[Step] = []
        self.values: dict[Node, Step | None] = {}  # None: a shape, which only another shape may read
        self.changed: dict[Step, Step] = {}  # a step to the in-place one that overwrote its result

    def run(self, graph: Graph) -> Steps:
        for node in graph.nodes:
            if node.op == "output":
                if not isinstance(node.args[0], Node):
                    raise UntraceableError("its forward does not return exactly one tensor")
                return Steps(self.steps, self.read(node, node.args[0]))
            self.values[node] = self.step(node)
        raise UntraceableError("its forward returns nothing")

    def read(self, node: Node, value: Any) -> Step:
        if not isinstance(value, Node):
            raise UntraceableError(f"{_where(node)} calls {_name(node)} with {value!r} for a tensor")
        step = self.values[value]
        if step is not None and step.kind == "parameter":
            raise UntraceableError(f"{_where(node)} uses '{step.path}' directly")
        if step is None:
            raise UntraceableError(f"{_where(node)} computes with the shape of a tensor")
        while step in self.changed:
            step = self.changed[step]
        return step

    def step(self, node: Node) -> Step | None:
        if node.op == "placeholder":
            return self.emit(node, Step("input"))
        if node.op == "get_attr":
            return Step("parameter", path=str(node.target))
        if node.op == "call_module":
            return self.module(node)
        if _is_shape(node) or any(isinstance(a, Node) and self.values[a] is None for a in node.args[:1]):
            if not _is_shape(node) and node.target is not operator.getitem:
                raise UntraceableError(f"{_where(node)} computes with the shape of a tensor")
            return None
        handler = _HANDLERS.get(node.target)
        if handler is None:
            raise UntraceableError(f"{_where(node)} calls {_name(node)}, which is not part of a conv-BN-ReLU chain")
        return handler(self, node)

    def emit(self, node: Node, step: Step) -> Step:
        self.steps.append(step)
        if step.inplace:
            target = step.inputs[0]
            if target.kind in _VIEWS:
                raise UntraceableError(f"{_where(node)} changes the block's input in place")
            self.changed[target] = step
        return step

    def module(self, node: Node) -> Step:
        path = str(node.target)
        module = self.root.get_submodule(path)
        kind = leaf_kind(module)
        if len(node.args) != 1 or node.kwargs:
            raise UntraceableError(f"{_where(node)} calls {named(path, module)} with more than one tensor")
        if path in self.leaves:
            return self.emit(node, Step("module", (self.read(node, node.args[0]),), path))
        if kind is None:
            raise UntraceableError(f"{named(path, module)} is not part of a conv-BN-ReLU chain")
        source = self.read(node, node.args[0])
        if kind == "identity":
            return source
        if isinstance(module, nn.ReLU):
            return self.emit(node, Step("relu", (source,), path, module.inplace))
        pool = None
        if isinstance(module, nn.MaxPool2d):
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
            pool = _pool_spec(named(path, module), *(getattr(module, name) for name in names))
        return self.emit(node, Step(kind, (source,), path, pool=pool))

    def relu(self, node: Node) -> Step:
        arguments = _bind(node, "input", inplace=False)
        inplace = arguments["inplace"] is True or node.target in (torch.relu_, "relu_")
        return self.emit(node, Step("relu", (self.read(node, arguments["input"]),), inplace=inplace))

    def add(self, node: Node) -> Step:
        arguments = _bind(node, "input", "other", alpha=1)
        if arguments["alpha"] != 1:
            raise UntraceableError(f"{_where(node)} adds with alpha={arguments['alpha']}")
        operands = self.read(node, arguments["input"]), self.read(node, arguments["other"])
        return self.emit(node, Step("add", operands, inplace=node.target in (operator.iadd, "add_")))

    def max_pool(self, node: Node) -> Step:
        a = _bind(
            node, "input", "kernel_size", stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
        )
        source = self.read(node, a.pop("input"))
        return self.emit(node, Step("pool", (source,), pool=_pool_spec(f"{_where(node)}'s max_pool2d", **a)))

    def conv(self, node: Node) -> Step:
        """A convolution in the forward of a user's ``nn.Conv2d``: with that module's own parameters and geometry."""
        a = _bind(node, "input", "weight", bias=None, stride=1, padding=0, dilation=1, groups=1)
        path, _, name = self.parameter(a["weight"]).rpartition(".")
        module = self.root.get_submodule(path) if path else None
        names = ("stride", "padding", "dilation", "groups")
        own = name == "weight" and isinstance(module, nn.Conv2d) and is_conv_with_more(module)
        expected = f"{path}.bias" if own and module.bias is not None else None  # type: ignore[union-attr]
        if not own or expected != (None if a["bias"] is None else self.parameter(a["bias"])):
            raise UntraceableError(f"{_where(node)} convolves with a weight or bias that is not an nn.Conv2d's own")
        if any(a[name] != getattr(module, name) for name in names):
            raise UntraceableError(f"{_where(node)} convolves with another stride, padding, dilation or groups")
        return self.emit(node, Step("conv", (self.read(node, a["input"]),), path))

    def parameter(self, value: Any) -> str:
        """The path of a parameter that is read directly; empty for anything else."""
        step = self.values.get(value) if isinstance(value, Node) else None
        return step.path if step is not None and step.kind == "parameter" else ""

    def copy(self, node: Node) -> Step:
        return self.emit(node, Step("copy", (self.read(node, _bind(node, "input")["input"]),)))

    def slice(self, node: Node) -> Step:
        arguments = _bind(node, "input", "index")
        source = self.read(node, arguments["input"])
        stride = _slice_stride(arguments["index"])
        if stride is None:
            raise UntraceableError(f"{_where(node)} indexes a tensor in another way than x[:, :, ::s, ::s]")
        return self.emit(node, Step("subsample", (source,), stride=stride))

    def pad(self, node: Node) -> Step:
        a = _bind(node, "input", "pad", mode="constant", value=None)
        pad = tuple(a["pad"]) if isinstance(a["pad"], (list, tuple)) else ()
        plain = all(type(p) is int for p in pad) and a["mode"] == "constant" and a["value"] in (None, 0)
        if not plain or len(pad) != 6 or any(pad[:4]) or min(pad) < 0:
            raise UntraceableError(f"{_where(node)} pads otherwise than zero channels before and after")
        return self.emit(node, Step("pad", (self.read(node, a["input"]),), channels=pad[4:]))

    def option_a(self, node: Node) -> Step:
        a = _bind(node, "x", "stride", "channel_offset", "out_channels")
        half = self.emit(node, Step("subsample", (self.read(node, a["x"]),), stride=a["stride"]))
        return self.emit(node, Step("pad", (half,), channels=(a["channel_offset"], 0), total=a["out_channels"]))


_HANDLERS: dict[Any, Callable[[_Translator, Node], Step]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), _Translator.relu),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _Translator.add),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _Translator.max_pool),
    **dict.fromkeys((torch.clone, "clone"), _Translator.copy),
    **dict.fromkeys((F.conv2d, torch.conv2d), _Translator.conv),
    operator.getitem: _Translator.slice,
    F.pad: _Translator.pad,
    pad_shortcut: _Translator.option_a,
}


def _where(node: Node) -> str:
    return str(node.meta["where"])


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _is_shape(node: Node) -> bool:
    """Whether the node reads a shape; it may, as long as nothing is computed with it."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.target is getattr and node.args[1] in ("shape", "ndim")


def _bind(node: Node, *names: str, **defaults: Any) -> dict[str, Any]:
    """The node's arguments by name; too many, missing or unknown ones are refused."""
    order = [*names, *defaults]
    bound = dict(zip(order, node.args, strict=False))
    extra = set(node.kwargs) - set(order) | set(bound) & set(node.kwargs)
    bound = {**defaults, **bound, **node.kwargs}
    if extra or len(node.args) > len(order) or len(bound) < len(order):
        raise UntraceableError(f"{_where(node)} calls {_name(node)} with arguments a chain does not know")
    return bound


def _slice_stride(index: Any) -> int | None:
    """The ``s`` of ``[:, :, ::s, ::s]`` or ``[..., ::s, ::s]``; None for any other index."""
    index = index if isinstance(index, tuple) else (index,)
    if index[:1] == (Ellipsis,):
        index = (slice(None), slice(None), *index[1:])
    if len(index) != 4 or not all(isinstance(i, slice) and i.start in (None, 0) and i.stop is None for i in index):
        return None
    steps = [1 if i.step is None else i.step for i in index]
    if steps[:2] != [1, 1] or steps[2] != steps[3] or type(steps[2]) is not int or steps[2] < 1:
        return None
    return steps[2]


def _pair(value: Any) -> Pair:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _pool_spec(
    name: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any, return_indices: Any
) -> PoolSpec:
    if _pair(dilation) != (1, 1) or ceil_mode or return_indices:
        raise UntraceableError(f"{name} is dilated, rounds up or returns indices")
    kernel = _pair(kernel_size)
    return PoolSpec(kernel, _pair(stride) if stride else kernel, _pair(padding))
