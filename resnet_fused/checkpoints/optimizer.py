"""Optimizer state to the parameters of the converted model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from .options import ConvertOptions
from .reading import shown
from .report import Conversion
from .roles import STATISTICS, ConversionError
from .translate import translate
from .wrappers import BOOKKEEPING, find, plain

# buffers of SGD's and Adam's kind have their parameter's shape; others' (Adafactor's, 8-bit ones) need not
_LIKE_PARAMETER = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def convert_optimizer(
    optimizer: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    src: str | None = None,
    dst: str = "torchvision",
    *,
    names: Sequence[str] | None = None,
    **options: Unpack[ConvertOptions],
) -> dict[str, Any]:
    """The state of an optimizer of the source model, for an optimizer of the converted one.

    torch numbers an optimizer's state by the order of the parameters, and formats order them differently. The
    result loads into an optimizer that was given the destination's parameters in their own order, in the same
    groups. The values are the same objects; parameters that ``drop`` leaves out leave their state out too.

    Args:
        optimizer: ``optimizer.state_dict()``.
        state_dict: the source model's, as `convert` takes it, in the model's own order.
        src, dst: as in `convert`.
        names: of the parameters, in the order in which the optimizer has them, all groups in a row. None takes its
            ``param_names``, and without them the order of ``state_dict``, which is right for one group of all of
            ``model.parameters()``.
        **options: see `ConvertOptions`; the same as in the model's own conversion.

    Raises:
        ConversionError: as `convert`; or the names are not known, not as many as the parameters, or a moment has
            not its parameter's shape.
    """
    out, report = translate(state_dict, src, dst, options)
    return carry(optimizer, state_dict, out, report, names, options.get("entry"))


def carry(
    optimizer: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    converted: Mapping[str, Tensor],
    report: Conversion,
    names: Sequence[str] | None = None,
    entry: str | None = None,
) -> dict[str, Any]:
    """`convert_optimizer` after its model's conversion.

    Raises:
        ConversionError: as there.
    """
    groups = optimizer.get("param_groups")
    if not isinstance(groups, list) or not isinstance(optimizer.get("state"), Mapping):
        raise ConversionError(
            f"convert_optimizer: optimizer: expected a state dict with state and param_groups, got {[*optimizer][:8]}"
        )
    found, *_ = find(state_dict, entry)
    targets = {name: report.keys.get(key) for name, key in plain([*map(str, found)])[0].items()}
    owners = _names(groups, found, names)
    places = {key: i for i, key in enumerate(converted)}
    state = {key: value for key, value in optimizer["state"].items() if key not in owners}
    new_groups, number = [], 0
    for group in groups:
        kept = []
        for old in group["params"]:
            if owners[old] not in targets:
                raise ConversionError(f"convert_optimizer: names: {owners[old]!r} is no key of state_dict")
            target = targets[owners[old]]
            if target is not None:
                kept.append((places[target], target, old))
        kept.sort()
        new = {**group, "params": list(range(number, number + len(kept)))}
        if "param_names" in group:
            new["param_names"] = [target for _, target, _ in kept]
        for index, (_, target, old) in zip(new["params"], kept):
            if old in optimizer["state"]:
                state[index] = _checked(optimizer["state"][old], converted[target], target)
        number += len(kept)
        new_groups.append(new)
    return {**optimizer, "state": state, "param_groups": new_groups}


def _names(
    groups: Sequence[Mapping[str, Any]], found: Mapping[str, Any], names: Sequence[str] | None
) -> dict[Any, str]:
    """The plain name of the parameter behind every number."""
    numbers = [number for group in groups for number in group["params"]]
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None:
        if len(groups) > 1:
            raise ConversionError(
                f"convert_optimizer: names: expected the names of the parameters, as there are {len(groups)} groups "
                "and no param_names, got None"
            )
        names = [
            str(key)
            for key, value in found.items()
            if isinstance(value, Tensor) and key not in BOOKKEEPING and str(key).rpartition(".")[2] not in STATISTICS
        ]
    if len(names) != len(numbers):
        raise ConversionError(
            f"convert_optimizer: names: expected {len(numbers)}, one for each parameter of the optimizer, got "
            f"{len(names)}: {shown([*names])}"
        )
    return dict(zip(numbers, plain([*names])[0]))


def _checked(state: Any, parameter: Tensor, key: str) -> Any:
    """``state``, if its moments have the parameter's shape."""
    for name in _LIKE_PARAMETER if isinstance(state, Mapping) else ():
        value = state.get(name)
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            raise ConversionError(
                f"convert_optimizer: {name} of {key}: expected shape {tuple(parameter.shape)}, got "
                f"{tuple(value.shape)}: the parameters are in another order; give their names"
            )
    return state
