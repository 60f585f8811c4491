"""Weights for a model from a file: a run of `resnet-fused train`, or a state_dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import FORMAT, NAME
from .errors import UserError


class Weights(NamedTuple):
    """A state_dict and, where a run wrote it, the run's settings (those of `TrainConfig`)."""

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any]


def read_weights(path: Path, what: str) -> Weights:
    """Read a file, or a run's folder, without running any code that it may hold.

    Args:
        path: a run's checkpoint or its folder, or a file with a state_dict, bare or as its ``state_dict`` or ``model``.
        what: the command and its flag, as errors begin.

    Raises:
        UserError: it is not there, damaged, or none of these.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{what} {path}: there is no such checkpoint")
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything from the unpickler
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} {path}: damaged, or not a checkpoint ({reason[:120]})") from error
    ours = isinstance(found, dict) and found.get("format") == FORMAT
    config = found["config"] if ours else {}
    if isinstance(found, dict):
        found = next((found[key] for key in ("state_dict", "model") if isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{what} {path}: expected a run's checkpoint or a state_dict, got {type(found).__name__}")
    return Weights(file, found, config)


def load_weights(model: nn.Module, weights: Weights, name: str, what: str) -> None:
    """Load them, every key.

    Raises:
        UserError: they are another model's.
    """
    try:
        model.load_state_dict(weights.state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        raise UserError(f"{what} {weights.path}: does not fit --model {name}: {' '.join(lines)[:300]}") from error
