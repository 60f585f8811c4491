"""Models by name: a builder of `resnet_fused.resnet`, ``torchvision:NAME`` or ``module:function``.

``cifar-N`` and ``plain-N`` are there for every depth of 6n + 2, not only for the paper's.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .errors import UserError


def builders() -> Mapping[str, Callable[..., nn.Module]]:
    """The names that ``--model`` takes, apart from the two forms with a colon."""
    from ..resnet import BUILDERS

    return BUILDERS


def _from_torchvision(name: str) -> Callable[..., nn.Module]:
    try:
        from torchvision import models
    except ImportError as error:
        raise UserError(f"--model torchvision:{name}: torchvision cannot be imported: {error}") from error
    if name not in models.list_models():
        raise UserError(f"--model: torchvision has no model {name!r}{_suggest(name, models.list_models())}")
    return models.get_model_builder(name)


def _from_module(module: str, function: str) -> Callable[..., nn.Module]:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"--model {module}:{function}: {error}") from error
    if not callable(found):
        raise UserError(f"--model {module}:{function}: module {module!r} has no function {function!r}")
    return found


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _builder(name: str) -> Callable[..., nn.Module]:
    if ":" in name:
        module, _, function = name.partition(":")
        return _from_torchvision(function) if module == "torchvision" else _from_module(module, function)
    known = builders()
    family, _, depth = name.partition("-")
    if name not in known and family in ("cifar", "plain") and depth.isdigit():
        from ..resnet import cifar_resnet, plain

        return functools.partial(cifar_resnet if family == "cifar" else plain, int(depth))
    if name not in known:
        hint = _suggest(name, known) or f"; expected one of {', '.join(known)}"
        raise UserError(f"--model: unknown model {name!r}{hint}, torchvision:NAME or module:function")
    return known[name]


def build_model(
    name: str, *, num_classes: int | None = None, in_channels: int | None = None, weights: str | None = None
) -> nn.Module:
    """The stock model called ``name``: plain torch.nn, nothing fused.

    Args:
        name: see the module's first line.
        num_classes: passed on where the builder takes it, as the other two are; None leaves its default.
        in_channels: of the image.
        weights: by torchvision's name.

    Raises:
        UserError: there is no such model, or its builder refuses.
    """
    build = _builder(name)
    try:
        parameters = inspect.signature(build).parameters
    except ValueError as error:
        raise UserError(f"--model {name}: not a function that builds a model: {error}") from error
    ours = ":" not in name
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    wanted: dict[str, Any] = {"num_classes": num_classes, "weights": weights}
    kwargs = {k: v for k, v in wanted.items() if v is not None and (k in parameters or open_ended)}
    # torchvision's builders end in **kwargs but know no in_channels: there it must be named.
    if in_channels is not None and (ours or "in_channels" in parameters):
        kwargs["in_channels"] = in_channels
    if ours or "fused" in parameters:
        kwargs["fused"] = False
    try:
        model = build(**kwargs)
    except (TypeError, ValueError, KeyError, OSError) as error:
        raise UserError(f"--model {name}: its builder refused {kwargs}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {name}: expected a torch.nn.Module, got {type(model).__name__}")
    return model


def input_channels(model: nn.Module) -> int:
    """Channels that the model's first convolution reads."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise UserError("--model: the model has no torch.nn.Conv2d")
