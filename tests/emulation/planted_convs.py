"""Bugs planted in the source of a kernel module: an edited copy of it is imported under another name."""

from __future__ import annotations

import importlib.util
import inspect
import linecache
import types
import zlib
from typing import Any

from tests.emulation.conv_samples import KERNELS


def edited(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """A copy of ``module`` in whose source ``old``, which must be there once, is ``new``."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, (source.count(old), old)
    name = f"{module.__name__}_planted"
    text = source.replace(old, new)
    filename = f"<{name} {zlib.crc32(text.encode())}>"
    # Triton reads a kernel's source back from the file of its function.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    copy = importlib.util.module_from_spec(spec)
    copy.__package__ = module.__package__
    exec(compile(text, filename, "exec"), vars(copy))
    return copy


def engine(module: types.ModuleType, old: str, new: str) -> Any:
    """`KERNELS` with the launcher of `edited`."""
    name = module.__name__.rpartition(".")[2]
    return types.SimpleNamespace(**{**vars(KERNELS), name: getattr(edited(module, old, new), name)})
