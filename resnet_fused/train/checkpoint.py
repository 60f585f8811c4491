"""Checkpoints that survive a crash: written beside the old one, then renamed over it.

A checkpoint is read with ``torch.load(weights_only=True)``: it holds tensors, numbers, strings, and
lists and dicts of them. ``"model"`` is the state_dict that the stock model loads.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

FORMAT = "resnet_fused.train"
VERSION = 1
NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
_FIELDS = {"format", "version", "config", "data", "iteration", "model", "lanes", "schedule", "rng", "history"}


def _keep_previous(path: Path) -> None:
    """Give the present checkpoint a second name; ``path`` itself never goes missing."""
    spare = path.with_name(PREVIOUS + ".new")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:
        shutil.copy2(path, spare)
    os.replace(spare, path.with_name(PREVIOUS))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` so that ``path`` always holds a whole checkpoint, the old or the new.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    state = {"format": FORMAT, "version": VERSION, **state}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            _keep_previous(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        raise UserError(f"train: --out {path.parent}: cannot write a checkpoint: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The rename itself must reach the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locate(path: Path) -> Path:
    """The checkpoint file that ``--resume`` names: a file, or a run's folder."""
    found = path / NAME if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"train: --resume {path}: there is no such checkpoint")
    return found


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save` onto the CPU, without running any code that it may hold.

    Raises:
        UserError: it is no file, is damaged, or is not one of ours.
    """
    path = locate(path)
    previous = path.with_name(PREVIOUS)
    hint = f"; the one before it is {previous}" if previous.is_file() and previous != path else ""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything from the unpickler
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"train: --resume {path}: damaged, or not a checkpoint ({reason[:120]}){hint}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(
            f"train: --resume {path}: expected a checkpoint of `resnet-fused train`, got {_describe(state)}"
        )
    if state.get("version") != VERSION or set(state) != _FIELDS:
        raise UserError(
            f"train: --resume {path}: expected checkpoint version {VERSION} with fields {', '.join(sorted(_FIELDS))}; "
            f"got version {state.get('version')} with {', '.join(sorted(map(str, state)))}"
        )
    return state


def _describe(state: object) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    keys = ", ".join(str(key) for key in list(state)[:3])
    return f"a dict with keys {keys}{', ...' if len(state) > 3 else ''}"
