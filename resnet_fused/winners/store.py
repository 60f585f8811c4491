"""The winners on disk: one JSON file per device and versions, written whole or not at all.

    <folder>/<device>-<hash>.json    {"format", "schema", "identity": {...}, "winners": {problem: {choice, words}}}

The folder is an argument, ``$RESNET_FUSED_CACHE``, or ``resnet_fused`` in the user's cache folder. The identity holds
everything that the times depend on beside the problem: package, torch, Triton and CUDA versions, and on a CPU the
instruction set. Writers take turns (a lock file) and merge; a reader sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = "resnet_fused.winners"
SCHEMA = 1
VARIABLE = "RESNET_FUSED_CACHE"
_SEPARATOR = " | "
_warned: set[str] = set()


class StoreError(Exception):
    """A file or folder that cannot be used, in words that name it."""


@dataclasses.dataclass(frozen=True)
class Winner:
    """A choice that was measured: the name of a variant, or the numbers of a tile; and the times in words."""

    choice: str | tuple[int, ...]
    words: str


def problem_key(device: str, problem: str) -> str:
    """The key of a problem on a device."""
    return f"{device}{_SEPARATOR}{problem}"


def device_of(key: str) -> str:
    """The device that a key is about."""
    return key.split(_SEPARATOR, 1)[0]


def folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where the files are: the argument, else ``$RESNET_FUSED_CACHE``, else the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    if named := os.environ.get(VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "resnet_fused"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cpu_isa() -> str:
    """The instruction set of the CPU kernels; the library registers its operator when it is loaded."""
    ask = getattr(torch.ops.resnet_fused, "cpu_isa", None)
    return f"{torch.backends.cpu.get_cpu_capability()}, kernels {'none' if ask is None else ask.default()}"


def identity(device: str) -> dict[str, str]:
    """What else the times on ``device`` depend on, by name."""
    from .. import __version__

    found = {"device": device, "resnet_fused": __version__, "torch": str(torch.__version__)}
    if device.startswith("cpu"):
        return {**found, "isa": _cpu_isa()}
    runtime = torch.version.cuda or torch.version.hip or "none"
    return {**found, "triton": _version("triton"), "cuda": runtime}


def path_of(device: str, where: Path) -> Path:
    """The file of a device under the versions of this process."""
    whole = hashlib.sha256(json.dumps(identity(device), sort_keys=True).encode()).hexdigest()
    return where / f"{_slug(device)}-{whole[:12]}.json"


def _slug(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")[:60]


def encode(table: Mapping[str, Winner]) -> dict[str, Any]:
    """A table as JSON holds it, in an order of its own."""
    return {key: {"choice": table[key].choice, "words": table[key].words} for key in sorted(table)}


def digest(table: Mapping[str, Winner]) -> str:
    """A hash of a table's choices: equal where every decision is equal."""
    choices = {key: table[key].choice for key in sorted(table)}
    return hashlib.sha256(json.dumps(choices).encode()).hexdigest()[:16]


def _decode_winner(key: object, value: Any) -> Winner:
    if not isinstance(key, str) or not isinstance(value, dict) or not isinstance(value.get("words"), str):
        raise StoreError(f"the entry {str(key)[:60]!r} is no winner")
    choice = value.get("choice")
    if isinstance(choice, list) and choice and all(type(n) is int and n > 0 for n in choice):
        return Winner(tuple(choice), value["words"])
    if isinstance(choice, str):
        return Winner(choice, value["words"])
    raise StoreError(f"the entry {key[:60]!r} chooses {str(choice)[:30]!r}")


def read(path: Path, device: str) -> dict[str, Winner]:
    """The winners in a file.

    Raises:
        StoreError: it cannot be read, is damaged, is not ours, or was made by other versions or for another device.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: damaged, not JSON ({str(error)[:80]})") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise StoreError(f"{path}: not a file of `resnet-fused tune`")
    if held.get("schema") != SCHEMA:
        raise StoreError(f"{path}: expected schema {SCHEMA}, got {held.get('schema')!r}")
    ours, theirs = identity(device), held.get("identity")
    if theirs != ours:
        theirs = theirs if isinstance(theirs, dict) else {}
        other = [f"{n} {theirs.get(n)!r}, here {ours[n]!r}" for n in ours if theirs.get(n) != ours[n]]
        raise StoreError(f"{path}: stale: made for {'; '.join(other) or 'more than is known here'}")
    winners = held.get("winners")
    if not isinstance(winners, dict):
        raise StoreError(f"{path}: damaged, it has no winners")
    try:
        return {key: _decode_winner(key, value) for key, value in winners.items()}
    except StoreError as error:
        raise StoreError(f"{path}: damaged, {error}") from error


def load(device: str, cache_dir: str | os.PathLike[str] | None = None) -> dict[str, Winner]:
    """The winners kept for ``device``, ``{}`` without a file; a file that cannot be used is warned of, once."""
    try:
        where = folder(cache_dir)
        path = path_of(device, where)
        if path.is_file():
            return read(path, device)
        others = sorted(where.glob(f"{_slug(device)}-*.json"))
    except (OSError, RuntimeError) as error:  # no home folder, no permission: then there is nothing kept
        _warn(f"the folder of measured choices cannot be looked at ({error})")
        return {}
    except StoreError as error:
        _warn(str(error))
        return {}
    if others:
        _warn(f"{others[-1]}: stale: made for other versions of torch, Triton, CUDA or resnet_fused")
    return {}


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"resnet_fused: measured choices are ignored: {reason}; `resnet-fused tune` measures anew", stacklevel=4
        )


def check_writable(where: Path) -> None:
    """Make the folder, and a file in it.

    Raises:
        StoreError: that is not possible.
    """
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        raise StoreError(f"{where}: cannot be written to: {error.strerror or error}") from error


@contextlib.contextmanager
def _turn(where: Path) -> Iterator[None]:
    """One writer at a time; where the system or the file system has no locks, the last one wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(where / ".lock", "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save(device: str, new: Mapping[str, Winner], where: Path) -> Path:
    """Add ``new`` to the file of ``device``, which always is whole; returns its path.

    What another process has written meanwhile is kept. A file that cannot be used is replaced.

    Raises:
        StoreError: the folder cannot be written to, or the disk is full.
    """
    check_writable(where)
    path = path_of(device, where)
    try:
        with _turn(where):
            kept: dict[str, Winner] = {}
            if path.exists():
                with contextlib.suppress(StoreError):
                    kept = read(path, device)
            head = {"format": FORMAT, "schema": SCHEMA, "identity": identity(device)}
            _write(path, json.dumps({**head, "winners": encode({**kept, **new})}, indent=1) + "\n")
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _write(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` so that it holds the old text or the new one at every moment."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    folder_descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder_descriptor)  # the new name must reach the disk too
    finally:
        os.close(folder_descriptor)
