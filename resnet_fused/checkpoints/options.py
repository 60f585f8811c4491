"""The options that `convert`, `convert_optimizer` and `convert_file` share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from typing_extensions import TypedDict


class ConvertOptions(TypedDict, total=False):
    """Keywords of `convert`.

    Args:
        drop: what may be left out: a part (``"fc"``, ``"se"``, ``"num_batches_tracked"``, ...: `DROPPABLE`), or a
            pattern of source keys (``"neck.*"``), or several of them. Default: nothing.
        strict: False leaves out keys of unknown meaning, with a warning, and takes a net that is not whole.
            Default: True.
        stages: blocks in each stage, for a source that counts its blocks through (labml), where they cannot be
            inferred from channels and projections.
        entry: the entry of a checkpoint that holds the state dict, where there are several.
        src_prefix: take only keys that begin so, without it (``"backbone."`` of a detector).
        dst_prefix: what the keys begin with, in place of the format's own prefix.
        num_batches_tracked: whether the destination's batch norms have the counter; default: as its own models have.
    """

    drop: str | Iterable[str]
    strict: bool
    stages: Sequence[int] | None
    entry: str | None
    src_prefix: str
    dst_prefix: str | None
    num_batches_tracked: bool | None
