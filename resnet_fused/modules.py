"""The classes that `fuse` swaps in: a block, a stage, a trunk.

Only the class of an object changes. Its children are the user's own modules and are read at every call,
so state dicts, optimizers, ``isinstance``, ``convert_sync_batchnorm`` and ``.to()`` go on working. Each
class is made from the stock class it replaces and keeps its name; pickling and deepcopy go through the
stock class (`__reduce_ex__`). What a fused forward cannot honour runs as it was written.
"""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .limits import bypassed, transform
from .links import Link
from .running import Run
from .structure import BINDING, Binding, hooked_globally, obstacle, stands_alone

NOTICE = "_resnet_fused_notice"


class Fused:
    """Mixin of every fused class: names, pickling, and the way back to the stock class."""

    stock_class: type[nn.Module]

    def _get_name(self) -> str:
        return f"Fused{type(self).__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if is_swapped(self) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = (self.stock_class, *reduced[1][1:])
            return (_new_fused, (_mixin_name(type(self)), *arguments), *reduced[2:])
        return reduced

    def __prepare_scriptable__(self) -> Any:
        """What `torch.jit.script` compiles in the place of a fused object: the stock one, with the same tensors."""
        if not is_swapped(self):
            return self
        twin = self.stock_class.__new__(self.stock_class)
        twin.__dict__ = {key: value for key, value in self.__dict__.items() if key not in (BINDING, NOTICE)}
        twin._modules = dict(self.__dict__["_modules"])  # whose entries torch replaces
        return twin


class FusedBlock(Fused):
    """A block that runs as a chain."""

    def as_link(self) -> Link | None:
        """This block as a link of a longer chain, or None where it must be called instead."""
        binding: Binding | None = self.__dict__.get(BINDING)
        if binding is None or binding.spec is None or stands_alone(self):  # type: ignore[arg-type]
            return None
        if type(self).forward is not FusedBlock.forward:
            return None
        if obstacle(self, binding) is not None:  # type: ignore[arg-type]
            return None
        return Link(self, binding.spec, binding.memory, binding.engine)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward's result, by the chain where it can run and by the stock forward elsewhere."""
        binding: Binding | None = self.__dict__.get(BINDING)
        if binding is None or binding.spec is None or len(args) != 1 or kwargs or bypassed(args[0]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        reason = transform() or obstacle(self, binding)  # type: ignore[arg-type]
        if reason is None:
            run = Run(args[0])
            link = Link(self, *binding[:3])  # type: ignore[arg-type]
            if run.takes(link):
                run.feed(link, last=True)
                return run.finish()
        else:
            notice(self, reason)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class FusedStage(Fused):
    """An ``nn.Sequential`` of blocks that runs as one chain."""

    def forward(self, x: Any) -> Any:
        """As ``nn.Sequential.forward``."""
        if bypassed(x) or transform() is not None:
            return super().forward(x)  # type: ignore[misc]
        return run_modules(in_order(self), x)


def is_sequence(module: object) -> bool:
    """Whether a module calls its children one after another and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward in (nn.Sequential.forward, FusedStage.forward)


def in_order(stage: Any) -> Iterator[nn.Module]:
    """The modules of a stage, with those of the sequences inside it that nobody watches in their place."""
    for module in stage:
        if is_sequence(module) and not stands_alone(module) and not hooked_globally():
            yield from in_order(module)
        else:
            yield module


class FusedTrunk(Fused):
    """A known residual network whose stem and stages run as one chain, up to the pooling."""

    def _forward_impl(self, x: Any) -> Any:
        binding: Binding | None = self.__dict__.get(BINDING)
        if binding is None or bypassed(x) or transform() is not None:
            return super()._forward_impl(x)  # type: ignore[misc]
        x = run_modules(self._trunk(binding), x)
        x = self.avgpool(x)  # type: ignore[attr-defined]
        x = torch.flatten(x, 1)
        return self.fc(x)  # type: ignore[attr-defined]

    def _trunk(self, binding: Binding) -> Iterable[nn.Module | Link]:
        """The stem, as a link or as its modules, then the blocks of every stage that nobody watches."""
        spec = binding.spec
        if spec is not None and obstacle(self, binding) is None:  # type: ignore[arg-type]
            yield Link(self, spec, binding.memory, binding.engine)  # type: ignore[arg-type]
        else:
            yield from (getattr(self, name) for name in STEM)
        for name in stage_names(self):  # type: ignore[arg-type]
            stage = getattr(self, name)
            yield from in_order((stage,))


STEM = ("conv1", "bn1", "relu", "maxpool")


def stage_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a residual network's stages, torchvision's or our own."""
    return getattr(model, "stages", ("layer1", "layer2", "layer3", "layer4"))


def run_modules(modules: Iterable[nn.Module | Link], x: Tensor) -> Tensor:
    """Run modules in order as one chain; those that are not fused blocks are called as they are."""
    run = Run(x)
    for module in modules:
        if isinstance(module, Link):
            link: Link | None = module
        else:
            link = module.as_link() if isinstance(module, FusedBlock) else None
        if link is not None and run.takes(link):
            run.feed(link)
        elif isinstance(module, Link):
            for name in STEM:
                run.feed_module(getattr(module.block, name))
        else:
            run.feed_module(module)
    return run.finish()


def notice(block: Any, reason: str) -> None:
    """Say once per object and reason that a block runs as it was written; never while compiling."""
    if torch.compiler.is_compiling():
        return
    told = block.__dict__.get(NOTICE, frozenset())
    if reason in told:
        return
    block.__dict__[NOTICE] = told | {reason}
    warnings.warn(f"resnet_fused: a {type(block).__name__} runs unfused: {reason}", UserWarning, stacklevel=3)


MIXINS: dict[str, type[Fused]] = {"block": FusedBlock, "stage": FusedStage, "trunk": FusedTrunk}
_CLASSES: dict[tuple[type, type], type] = {}


def _mixin_name(cls: type) -> str:
    return next(name for name, mixin in MIXINS.items() if issubclass(cls, mixin))


def fused_class(stock: type, mixin: type[Fused]) -> type:
    """The fused twin of a stock class; made once, with the stock class's name."""
    key = (stock, mixin)
    if key not in _CLASSES:
        body = {
            "__module__": stock.__module__,
            "__qualname__": stock.__qualname__,
            "__doc__": stock.__doc__,
            "stock_class": stock,
            **getattr(mixin, "class_body", lambda _: {})(stock),
        }
        _CLASSES[key] = type(stock)(stock.__name__, (mixin, stock), body)
    return _CLASSES[key]


def is_swapped(module: object) -> bool:
    """Whether an object's class stands for a stock class; a user's subclass of a fused class does not."""
    return isinstance(module, Fused) and type(module) in _CLASSES.values()


def register_fused_class(cls: type) -> type:
    """Class decorator: make a written-out fused class the twin of its ``stock_class``."""
    mixin = MIXINS[_mixin_name(cls)]
    _CLASSES[(cls.stock_class, mixin)] = cls  # type: ignore[attr-defined]
    return cls


def _new_fused(mixin: str, stock: type, *args: Any) -> Any:
    cls = fused_class(stock, MIXINS[mixin])
    return cls.__new__(cls, *args)
