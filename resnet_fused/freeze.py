"""Fine-tuning: batch norms that keep their statistics, and whole stages that do not train.

A frozen batch norm is the same object of the same class, with the same state dict. It is in eval mode, and stays so
when somebody calls ``train()`` on it or on a model that holds it: its own ``train`` is replaced on the instance. What
it was is kept beside it, and comes back with `unfreeze_bn` or `unfreeze_stages`.

Freeze before `DistributedDataParallel` wraps the model, which waits for the gradient of every parameter that wanted
one when it was wrapped, and before the optimizer is made.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
FROZEN = "_resnet_fused_frozen"
_STAGE = re.compile(r"(layer|res)\d+")  # torchvision's and timm's names, and detectron2's
_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclasses.dataclass
class _Frozen:
    """What a module was before it was frozen; lives in its ``__dict__`` and is copied and pickled with it.

    Args:
        by: who froze it, "bn", "affine" or "stages"; it thaws when nobody is left.
        training: the mode that a batch norm would be in.
        requires_grad: of its own parameters, where they were frozen.
    """

    by: set[str]
    training: bool
    requires_grad: dict[str, bool] = dataclasses.field(default_factory=dict)


def freeze_bn(model: Model, *, affine: bool = True) -> Model:
    """Freeze every batch norm of ``model``: it normalises by its running statistics and does not move them.

    It stays so through ``model.train()``. Batch norms of any dimension and synchronised ones are meant; a
    ``FrozenBatchNorm2d`` is frozen as it is.

    Args:
        model: any module, fused or not; returned.
        affine: whether weight and bias stop training too (``requires_grad`` False).

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: a batch norm has no running statistics; nothing is changed then.

    Equivalent to: ``norm.eval()`` after every ``model.train()``, and ``requires_grad_(False)`` on its parameters.
    """
    _require_module("freeze_bn", model)
    norms = _norms("freeze_bn", model.named_modules())
    for norm in norms:
        _hold(norm, "bn")
    if affine:
        _stop(norms, "affine")
    return model


def unfreeze_bn(model: Model) -> Model:
    """Undo `freeze_bn`: every batch norm is in the mode last asked of it, and trains what it trained before.

    What `freeze_stages` froze stays frozen. Returns ``model``.
    """
    _require_module("unfreeze_bn", model)
    for module in model.modules():
        _release(module, "bn", "affine")
    return model


def freeze_stages(model: Model, stages: int) -> Model:
    """Freeze the stem and the first ``stages`` stages: no parameter trains, no batch norm moves its statistics.

    It stays so through ``model.train()``. A frozen beginning has no backward and keeps nothing for it. Dropout and
    the like follow ``model.train()`` as before.

    Args:
        model: a residual network, or a module that holds exactly one, such as a detector's backbone. Its stages are
            its ``layer1``, ``layer2``, ... (ours, torchvision's, timm's), ``res2``, ... (detectron2's) or
            ``encoder.stages`` (Hugging Face's); what stands before the first of them is the stem. Returned.
        stages: from 0, the stem alone, to all of them.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, ``stages`` not an integer.
        ValueError: no stages are found, or in more than one network, or fewer than asked for; a batch norm has no
            running statistics. Nothing is changed then.
    """
    _require_module("freeze_stages", model)
    if not isinstance(stages, int) or isinstance(stages, bool):
        raise TypeError(f"freeze_stages: stages: expected an integer, got {type(stages).__name__}")
    stem, found = _parts(model)
    if not 0 <= stages <= len(found):
        raise ValueError(f"freeze_stages: stages: expected 0 to {len(found)}, the model's stages, got {stages}")
    frozen = list(dict.fromkeys(itertools.chain.from_iterable(part.modules() for part in (*stem, *found[:stages]))))
    names = {module: name for name, module in model.named_modules()}
    for norm in _norms("freeze_stages", ((names[module], module) for module in frozen)):
        _hold(norm, "stages")
    _stop(frozen, "stages")
    return model


def unfreeze_stages(model: Model) -> Model:
    """Undo `freeze_stages`, whatever the number of stages was; what `freeze_bn` froze stays. Returns ``model``."""
    _require_module("unfreeze_stages", model)
    for module in model.modules():
        _release(module, "stages")
    return model


def _require_module(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model: expected a torch.nn.Module, got {type(model).__name__}")


def _norms(name: str, modules: Iterable[tuple[str, nn.Module]]) -> list[nn.Module]:
    """The batch norms among ``modules``, none of them without statistics."""
    norms = [(path, m) for path, m in modules if isinstance(m, _BatchNorm)]
    for path, norm in norms:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                f"{name}: model: expected batch norms with running statistics, got '{path}' without "
                "(track_running_stats=False)"
            )
    return [norm for _, norm in norms]


def _parts(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The stem's modules and the stages of the one residual network that ``model`` is or holds."""
    networks: dict[str, tuple[list[nn.Module], list[nn.Module]]] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in networks)
        if not inside and (parts := _split(module)) is not None:
            networks[name] = parts
    if len(networks) == 1:
        return next(iter(networks.values()))
    what = f"in {', '.join(networks)}; name one of them" if networks else f"none in a {type(model).__name__}"
    raise ValueError(
        "freeze_stages: model: expected one residual network with stages 'layer1', ..., 'res2', ... or "
        f"'encoder.stages', got {what}"
    )


def _split(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]] | None:
    """Stem and stages of a residual network, in the order of its children; None where it is none."""
    inner = getattr(getattr(module, "encoder", None), "stages", None)
    stages: Any = list(inner) if isinstance(inner, nn.ModuleList) else []
    if stages:
        first = module.encoder
    else:
        stages = [child for name, child in module.named_children() if _STAGE.fullmatch(name)]
        if not stages:
            return None
        first = stages[0]
    return list(itertools.takewhile(lambda child: child is not first, module.children())), stages


def _record(module: nn.Module) -> _Frozen:
    return module.__dict__.setdefault(FROZEN, _Frozen(set(), module.training))


def _hold(norm: nn.Module, by: str) -> None:
    """Put a batch norm into eval mode for good."""
    _record(norm).by.add(by)
    norm.training = False
    norm.__dict__["train"] = functools.partial(_note_mode, norm)


def _note_mode(norm: nn.Module, mode: bool = True) -> nn.Module:
    """``train`` of a frozen batch norm: the mode is noted for later."""
    if not isinstance(mode, bool):
        raise ValueError("training mode is expected to be boolean")
    norm.__dict__[FROZEN].training = mode
    return norm


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False)


def _stop(modules: list[nn.Module], by: str) -> None:
    """Let the modules' own parameters want no gradient; all are noted first, since two modules may share one."""
    for module in modules:
        for name, parameter in _own(module):
            record = _record(module)
            record.by.add(by)
            record.requires_grad.setdefault(name, parameter.requires_grad)
    for module in modules:
        for _, parameter in _own(module):
            parameter.requires_grad_(False)


def _release(module: nn.Module, *by: str) -> None:
    """Give back what nobody else holds."""
    record: _Frozen | None = module.__dict__.get(FROZEN)
    if record is None:
        return
    record.by.difference_update(by)
    if not record.by & {"affine", "stages"}:
        for name, parameter in _own(module):
            parameter.requires_grad_(record.requires_grad.pop(name, parameter.requires_grad))
    if not record.by & {"bn", "stages"} and module.__dict__.pop("train", None) is not None:
        module.training = record.training
    if not record.by:
        del module.__dict__[FROZEN]
