"""Result files that are whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ..train.errors import UserError


def check_writable(path: Path, flag: str) -> None:
    """Refuse, before anything is measured, a file that could not be written at the end.

    Raises:
        UserError: it names a folder, its folder is not there, or nothing can be made in it.
    """
    if path.is_dir():
        raise UserError(f"bench: {flag} {path}: expected a file, got a folder")
    if not path.parent.is_dir():
        raise UserError(f"bench: {flag} {path}: cannot be written: there is no folder {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"bench: {flag} {path}: cannot be written: {error.strerror}") from error


def write_atomically(path: Path, content: bytes, what: str = "bench:") -> None:
    """Write beside ``path``, then rename: ``path`` is always a whole file, the old one or the new one.

    ``what``: the command, and the flag that named the file, as an error begins.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any, what: str = "bench:") -> None:
    """Write ``document`` atomically; what is no finite number becomes null.

    Raises:
        UserError: as `write_atomically`.
    """
    text = json.dumps(_finite(document), indent=1, allow_nan=False, default=str)
    write_atomically(path, f"{text}\n".encode(), what)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
