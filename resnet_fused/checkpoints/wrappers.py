"""Take off what training tools put around a state dict: entries of a checkpoint, and prefixes of every key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .holding import ASKED, DROPPABLE
from .roles import ConversionError

ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
)
# DDP and DataParallel; Lightning; torch.optim.swa_utils writes ``module.`` too
PREFIXES = ("module.", "model.", "net.", "network.")
# torch.compile, FSDP and activation checkpointing name themselves wherever they stand
COMPONENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
BOOKKEEPING = {"n_averaged": "the averaged model's own count"}


def holds_tensors(value: Any) -> bool:
    """Whether a value is a state dict, or has one under one of `ENTRIES`."""
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(v, Tensor) or (k in ENTRIES and holds_tensors(v)) for k, v in value.items())


def find(checkpoint: Any, entry: str | None = None) -> tuple[Mapping[str, Any], tuple[str, ...], tuple[str, ...]]:
    """The mapping that holds tensors, the entries that lead to it, and the other entries that could have.

    Args:
        checkpoint: a state dict, or a mapping with one under one of `ENTRIES`, to any depth.
        entry: the entry to take at the first level.

    Raises:
        ConversionError: there is none.
    """
    if isinstance(checkpoint, nn.Module):
        raise ConversionError(
            f"convert: state_dict: expected a state dict, got a {type(checkpoint).__name__}: give its state_dict()"
        )
    path: list[str] = []
    others: list[str] = []
    while isinstance(checkpoint, Mapping):
        found = [name for name in ENTRIES if holds_tensors(checkpoint.get(name))]
        if entry is not None:
            if not isinstance(checkpoint.get(entry), Mapping):
                raise ConversionError(f"convert: entry: expected a mapping at {entry!r}, got keys {[*checkpoint][:8]}")
            found, entry = [entry, *(name for name in found if name != entry)], None
        elif any(isinstance(value, Tensor) for value in checkpoint.values()):
            return checkpoint, tuple(path), tuple(others)
        if not found:
            break
        path.append(found[0])
        others += found[1:]
        checkpoint = checkpoint[found[0]]
    got = f"keys {[*checkpoint][:8]}" if isinstance(checkpoint, Mapping) else f"a {type(checkpoint).__name__}"
    raise ConversionError(f"convert: state_dict: expected tensors by name, or under one of {ENTRIES}, got {got}")


def plain(keys: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Plain key to wrapped key, and the prefixes and components that were taken off.

    Raises:
        ConversionError: two keys differ in wrappers only.
    """
    removed = [name for name in COMPONENTS if any(name in key.split(".") for key in keys)]
    names = {key: ".".join(part for part in key.split(".") if part not in COMPONENTS) for key in keys}
    while True:
        counted = [key for key in keys if key not in BOOKKEEPING]
        prefix = next((p for p in PREFIXES if counted and all(names[key].startswith(p) for key in counted)), None)
        if prefix is None:
            break
        removed.append(prefix)
        names.update({key: names[key][len(prefix) :] for key in counted})
    out: dict[str, str] = {}
    for key, name in names.items():
        if name in out:
            raise ConversionError(f"convert: state_dict: {out[name]} and {key} are both {name} without their wrappers")
        out[name] = key
    return out, tuple(removed)


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """The tensors of a checkpoint by plain name, and an account of the rest.

    ``original``: plain name to the source's key; ``dropped``: source key to the reason; ``foreign``: source keys
    whose values are no tensors; ``taken_off``: entries and prefixes.
    """

    tensors: dict[str, Tensor]
    original: dict[str, str]
    dropped: dict[str, str]
    foreign: tuple[str, ...]
    taken_off: tuple[str, ...]
    notes: tuple[str, ...]


def unwrap(checkpoint: Any, entry: str | None, prefix: str, patterns: Sequence[str]) -> Unwrapped:
    """Find the state dict, leave out what ``patterns`` name or does not begin with ``prefix``, take wrappers off.

    Raises:
        ConversionError: there is no state dict, or a pattern matches no key, with or without wrappers.
    """
    found, path, others = find(checkpoint, entry)
    dropped = {str(key): f"not under {prefix!r}" for key in found if not str(key).startswith(prefix)}
    dropped.update({str(key): ASKED for key in found if any(fnmatchcase(str(key), p) for p in patterns)})
    unused = [p for p in patterns if not any(fnmatchcase(str(key), p) for key in found)]
    names, removed = plain([str(key)[len(prefix) :] for key in found if str(key) not in dropped])
    original = {name: prefix + key for name, key in names.items()}
    for pattern in unused:
        matches = [name for name in original if fnmatchcase(name, pattern)]
        if not matches:
            raise ConversionError(
                f"convert: drop: expected one of {DROPPABLE} or a pattern that matches a key, got {pattern!r}"
            )
        dropped.update({original.pop(name): ASKED for name in matches})
    dropped.update({original.pop(name): why for name, why in BOOKKEEPING.items() if name in original})
    values = {str(key): value for key, value in found.items()}
    tensors = {name: values[key] for name, key in original.items() if isinstance(values[key], Tensor)}
    return Unwrapped(
        tensors=tensors,
        original=original,
        dropped=dropped,
        foreign=tuple(key for name, key in original.items() if name not in tensors),
        taken_off=(*(f"entry {name}" for name in path), *removed, *([prefix] if prefix else [])),
        notes=(f"the checkpoint also has {', '.join(others)}; entry={others[0]!r} takes it instead",) if others else (),
    )
