"""Checkpoint files: read without running code, converted with what they hold beside the model, written whole."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .optimizer import carry
from .options import ConvertOptions
from .report import Conversion
from .roles import ConversionError
from .translate import translate
from .wrappers import ENTRIES, holds_tensors

SAFETENSORS = ".safetensors"
OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim", "optimizer_states")


def convert_file(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    src: str | None = None,
    dst: str = "torchvision",
    **options: Unpack[ConvertOptions],
) -> Conversion:
    """Convert a checkpoint file; see `convert`.

    A checkpoint that holds more than a state dict keeps its form: other state dicts in it (EMA) and the optimizer
    are converted too, all else is kept; what cannot be is left out, and the report's notes say so.

    Args:
        path: read by ``torch.load(weights_only=True)``, or by safetensors where the name ends so.
        out: the file to write, as a whole or not at all, in the way its name says; None converts only.
        src, dst: as in `convert`.
        **options: see `ConvertOptions`.

    Raises:
        ConversionError: as `convert`; or the file is damaged, holds more than ``weights_only`` admits, or wants
            safetensors, which is not installed.
        OSError: the file cannot be read or written.
    """
    checkpoint = load(path)
    converted, report = translate(checkpoint, src, dst, options)
    notes: list[str] = []
    whole = _rewrapped(checkpoint, converted, report, options, dst, notes)
    if out is not None:
        if whole is not converted and Path(out).suffix == SAFETENSORS:
            left = ", ".join(name for name in map(str, whole) if name not in _path(report))
            notes = [f"left out, as a {SAFETENSORS} file holds tensors only: {left}"] if left else []
            whole = converted
        save(whole, out)
    return dataclasses.replace(report, notes=(*report.notes, *notes))


def _path(report: Conversion) -> list[str]:
    return [taken.removeprefix("entry ") for taken in report.wrappers if taken.startswith("entry ")]


def _rewrapped(
    checkpoint: Mapping[str, Any],
    converted: dict[str, Tensor],
    report: Conversion,
    options: ConvertOptions,
    dst: str,
    notes: list[str],
) -> dict[str, Any]:
    """The checkpoint with ``converted`` in place of its state dict; ``notes`` says what became of the rest."""
    path = _path(report)
    if not path:
        return converted
    inner: ConvertOptions = {**options, "entry": None}
    whole: dict[str, Any] = {}
    for name, value in checkpoint.items():
        if name == path[0]:
            rest = dataclasses.replace(report, wrappers=tuple(f"entry {entry}" for entry in path[1:]))
            whole[name] = _rewrapped(value, converted, rest, inner, dst, notes) if path[1:] else converted
            continue
        try:
            whole[name] = _beside(name, value, checkpoint, converted, report, inner, dst)
        except ConversionError as error:
            notes.append(f"left out: {name}: {str(error).splitlines()[0]}")
    changed = [name for name in whole if name != path[0] and whole[name] is not checkpoint[name]]
    kept = [name for name in whole if name != path[0] and name not in changed]
    notes += [f"also converted: {', '.join(changed)}"] * bool(changed)
    notes += [f"kept as they are: {', '.join(kept)}"] * bool(kept)
    return whole


def _beside(
    name: str,
    value: Any,
    checkpoint: Mapping[str, Any],
    converted: Mapping[str, Tensor],
    report: Conversion,
    options: ConvertOptions,
    dst: str,
) -> Any:
    """An entry beside the model's, for the converted model.

    Raises:
        ConversionError: it is a state dict or an optimizer's state, and cannot be converted.
    """
    if name in OPTIMIZERS and isinstance(value, list):
        return [_beside(name, one, checkpoint, converted, report, options, dst) for one in value]
    if name in OPTIMIZERS and isinstance(value, Mapping):
        return carry(value, checkpoint, converted, report, entry=_path(report)[0])
    if name in ENTRIES and holds_tensors(value):
        return translate(value, report.src, dst, options)[0]
    return value


def load(path: str | os.PathLike[str]) -> Any:
    """What a checkpoint file holds, on the CPU.

    Raises:
        ConversionError: it is damaged, or holds what ``torch.load(weights_only=True)`` does not admit, or safetensors
            is not installed.
        OSError: it cannot be read.
    """
    safe = _safetensors() if Path(path).suffix == SAFETENSORS else None
    with open(path, "rb") as file:
        try:
            return safe.load_file(path) if safe else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes either reader raise nearly anything, OSError too
            reader = "safetensors" if safe else "torch.load(weights_only=True)"
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConversionError(f"convert: {path}: {reader} refuses it: {reason}") from error


def save(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``checkpoint`` so that ``path`` is a whole file at any time, the old one or the new one.

    Raises:
        ConversionError: safetensors is wanted and not installed.
        OSError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        if path.suffix == SAFETENSORS:
            tensors = {key: value.contiguous() for key, value in checkpoint.items()}
            content = _safetensors().save(tensors, metadata={"format": "pt"})
            temporary.write_bytes(content)
        else:
            with temporary.open("wb") as file:
                torch.save(dict(checkpoint), file)
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConversionError(
            f"convert: {SAFETENSORS} files need safetensors, which is not installed (pip install safetensors)"
        ) from error
    return safetensors.torch
