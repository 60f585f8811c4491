"""A convolution that waits for its batch norm, while a network's own forward runs as it was written.

The convolutions of a run (convolution, batch norm, ReLU, max pool, loose in a forward) hand out a `Deferred`
instead of a tensor. ``F.batch_norm``, ``F.relu`` and ``F.max_pool2d`` find it among their arguments (torch's
``__torch_function__`` protocol) and add themselves to it; the last step of the run that was found by tracing
executes all of them as a chain and returns an ordinary tensor. Anything else that touches a `Deferred` gets
the tensor that the stock modules would have made at that point. So no control flow, attribute or module of the
forward is assumed: a run that is not called as it was found is slower, not different.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import engines
from .calls import SiteCall, SiteParams
from .chain import apply_site
from .limits import recomputing
from .links import Link, child, conv_padding, weight_and_bias
from .nodes import Pending, PoolFunction
from .running import Run
from .spec import ChainSpec, PoolSpec

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_AUTOCAST_DEVICES = ("cuda", "cpu")
_POOLS = (F.max_pool2d, torch.max_pool2d)
_IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_)


class SiteRun(Run):
    """A chain fed site by site; every step leaves it as it is and returns the chain that goes on."""

    def after_site(self, link: Link, bound: Callable[[str], tuple[SiteCall, SiteParams]]) -> SiteRun:
        """One site alone.

        Args:
            link: whose first convolution the site's is.
            bound: makes the site's call and tensors, given the engine's name.
        """
        run = self._branch()
        if isinstance(run._state, Tensor):
            run._enter(link, run._state)
        call, params = bound(run._engine)
        engine = engines.get(run._engine)
        keeps = call.training or torch.is_grad_enabled() or not isinstance(run._state, Tensor)
        if keeps or not hasattr(engine, "site_infer"):
            run._state, _ = apply_site(run._state, call, params, False)
        else:
            run._state = engine.site_infer(call, run._state, params, None, call.relu)
        return run

    def after_pool(self, pool: PoolSpec) -> SiteRun:
        """A max pool of the activation."""
        run, window = self._branch(), (pool.kernel, pool.stride, pool.padding)
        state = run._state
        if isinstance(state, Pending):
            run._state = PoolFunction.apply(run._engine, state.relu, window, state.y, state.moments, state.carrier)
        else:
            run._state = F.max_pool2d(state, *window)
        return run

    def _branch(self) -> SiteRun:
        run = SiteRun(self._state)  # type: ignore[arg-type]
        run._entering, run._engine = self._entering, self._engine
        run._channels_last, run._promote = self._channels_last, self._promote
        return run


class Norm:
    """The arguments of one call of ``F.batch_norm``; ``counted`` once its running statistics have moved."""

    def __init__(
        self,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        self.vectors = (weight, bias)
        self.running = (running_mean, running_var)
        self.training, self.momentum, self.eps = training, momentum, eps
        self.counted = False


class Deferred:
    """What a waiting convolution returns: stands for a tensor, and becomes it when anybody looks.

    Args:
        link: the rest of the run, from this convolution on.
        run: the chain up to this convolution.
        norm, relu: what has been called on it so far.
    """

    def __init__(self, link: Link, run: SiteRun, norm: Norm | None = None, relu: bool = False) -> None:
        self._link, self._run, self._norm, self._relu = link, run, norm, relu
        self._value: Tensor | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = args[0] if args else kwargs.get("input")
        if type(own) is Deferred and own._value is None:
            if func is F.batch_norm and own._norm is None:
                return own._normalised(Norm(*args[1:], **{k: v for k, v in kwargs.items() if k != "input"}))
            if func in _RELUS and own._norm is not None and not own._relu:
                return own._rectified(func in _IN_PLACE or kwargs.get("inplace", False) is True)
            pool = own._link.spec.pool
            if func in _POOLS and own._norm is not None and _window(*args, **kwargs) == pool:
                return own.executed().after_pool(pool).finish()  # type: ignore[arg-type]
        return func(*released(args), **released(kwargs))

    def tensor(self) -> Tensor:
        """The tensor that the stock modules would have made, without what was not called yet."""
        if self._value is None:
            if self._norm is None:
                conv = child(self._link.block, self._link.spec.sites[0].conv)
                self._value = type(conv).forward(conv, self._run.finish())
            else:
                self._value = self.executed().finish()
        return self._value

    def executed(self) -> SiteRun:
        """The chain with this site in it."""
        norm = self._norm
        assert norm is not None
        conv = child(self._link.block, self._link.spec.sites[0].conv)

        def bind(engine: str) -> tuple[SiteCall, SiteParams]:
            padding = conv_padding(conv)
            geometry = (conv.stride, padding, conv.dilation, conv.groups)
            call = SiteCall(engine, *geometry, self._relu, norm.training, norm.momentum, norm.eps)
            moved = norm.training and (norm.counted or recomputing())
            running = (None, None) if moved else norm.running
            norm.counted = True
            return call, SiteParams(*weight_and_bias(conv), *norm.vectors, *running, None)

        return self._run.after_site(self._link, bind)

    def run(self) -> SiteRun:
        """The chain as the next convolution reads it."""
        return SiteRun(self.tensor()) if self._norm is None or self._value is not None else self.executed()

    def _normalised(self, norm: Norm) -> Any:
        return Deferred(self._link, self._run, norm)._unless_last(self._link.spec.sites[0].relu)

    def _rectified(self, inplace: bool) -> Any:
        rectified = self if inplace else Deferred(self._link, self._run, self._norm)
        rectified._relu = True
        return rectified._unless_last(False)

    def _unless_last(self, more: bool) -> Any:
        spec = self._link.spec
        return self if more or len(spec.sites) > 1 or spec.pool is not None else self.tensor()

    def dim(self) -> int:
        """As ``Tensor.dim``; batch norm asks for it."""
        return 4

    def relu(self) -> Any:
        """As ``Tensor.relu``."""
        return torch.relu(self)  # type: ignore[arg-type]

    def relu_(self) -> Any:
        """As ``Tensor.relu_``."""
        return F.relu_(self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


def _operator(name: str) -> Callable[..., Any]:
    def call(self: Deferred, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*released(args))

    return call


_COMPARISONS = {"__lt__", "__le__", "__gt__", "__ge__"}
_OPERATORS = {name for name in dir(Tensor) if name.startswith("__") and callable(getattr(Tensor, name))}
for _name in _COMPARISONS | _OPERATORS - set(dir(Deferred)) - {"__torch_dispatch__"}:  # Python reads them off the class
    setattr(Deferred, _name, _operator(_name))


def _window(
    _: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> PoolSpec | None:
    """The arguments of ``F.max_pool2d`` as a chain's pool; None if it has no such pool."""
    if ceil_mode or return_indices or _pair(dilation) != (1, 1):
        return None
    return PoolSpec(_pair(kernel_size), _pair(stride or kernel_size), _pair(padding))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def released(value: Any) -> Any:
    """``value`` with every `Deferred` in it, also inside tuples, lists and dicts, made a tensor."""
    if isinstance(value, Deferred):
        return value.tensor()
    if type(value) in (tuple, list):
        items = [released(v) for v in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if type(value) is dict:
        items = [released(v) for v in value.values()]
        return value if all(a is b for a, b in zip(items, value.values(), strict=True)) else dict(zip(value, items))
    return value


class Modes(NamedTuple):
    """Under which a convolution may wait: a checkpointed part of the forward, or its own autocast, has others."""

    gradients: bool
    autocast: tuple[bool, ...]
    saved_tensor_hooks: object

    @classmethod
    def now(cls) -> Modes:
        """The modes of this moment."""
        hooks = None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)
        autocast = tuple(torch.is_autocast_enabled(device) for device in _AUTOCAST_DEVICES)
        return cls(torch.is_grad_enabled(), autocast, hooks)


def rests(spec: ChainSpec) -> tuple[ChainSpec, ...]:
    """What is left of a run from each of its sites on."""
    return tuple(ChainSpec(spec.sites[i:], relu=spec.relu, pool=spec.pool) for i in range(len(spec.sites)))


def arm(link: Link, rests: tuple[ChainSpec, ...]) -> list[nn.Module]:
    """Make the convolutions of a run wait, each with the rest of the run; returns them for `disarm`."""
    modes = Modes.now()
    armed = []
    for site, rest in zip(link.spec.sites, rests, strict=True):
        conv = child(link.block, site.conv)
        conv.__dict__["forward"] = functools.partial(_convolve, conv, link._replace(spec=rest), modes)
        armed.append(conv)
    return armed


def disarm(convs: list[nn.Module]) -> None:
    """Undo `arm`."""
    for conv in convs:
        conv.__dict__.pop("forward", None)


def is_armed(conv: nn.Module) -> bool:
    """Whether another thread's forward has armed it."""
    forward = conv.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _convolve


def _convolve(conv: nn.Conv2d, link: Link, modes: Modes, x: Any) -> Any:
    """The forward of a convolution in a run."""
    if isinstance(x, Deferred):
        run = x.run()
    elif isinstance(x, Tensor) and not isinstance(x, torch.fx.Proxy):
        run = SiteRun(x)
    else:
        return type(conv).forward(conv, x)
    if Modes.now() == modes and run.takes(link):
        return Deferred(link, run)
    return type(conv).forward(conv, run.finish())
