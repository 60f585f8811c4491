"""What a conversion did, for a reader and for code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The account of one call of `convert`: every key of the source is in ``keys``, ``dropped`` or ``unknown``.

    Args:
        src, dst: names of the formats.
        also: other formats that read the source to the same tensors.
        stages: blocks in each stage.
        keys: source key to destination key, in the source's order.
        created: destination keys that the source has not: batch counters, zero.
        dropped: source key to the reason why the destination has not got it.
        unknown: source keys without a meaning in ``src``, left out (``strict=False`` only).
        wrappers: what was taken off before reading: entries of a nested checkpoint and prefixes.
        warnings: in what the destination's own models differ, so that loading or results may.
        notes: what else is worth knowing.
    """

    src: str
    dst: str
    also: tuple[str, ...]
    stages: tuple[int, ...]
    keys: Mapping[str, str]
    created: tuple[str, ...]
    dropped: Mapping[str, str]
    unknown: tuple[str, ...]
    wrappers: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        also = f" (read alike as {', '.join(self.also)})" if self.also else ""
        blocks = "+".join(map(str, self.stages))
        lines = [f"{self.src}{also} to {self.dst}: {len(self.keys)} tensors carried, stages of {blocks} blocks"]
        if self.wrappers:
            lines.append(f"taken off: {', '.join(self.wrappers)}")
        if self.created:
            lines.append(f"created, zero: {_few(self.created)}")
        reasons: dict[str, list[str]] = {}
        for key, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(key)
        lines += [f"left out, {reason}: {_few(keys)}" for reason, keys in reasons.items()]
        if self.unknown:
            lines.append(f"left out, of unknown meaning: {_few(self.unknown)}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _few(keys: list[str] | tuple[str, ...]) -> str:
    more = f", ... ({len(keys)} in all)" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
