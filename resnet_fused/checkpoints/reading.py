"""Keys to roles: read a state dict as one format, or find the one format that it is in."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from .checks import problems, unusual
from .formats import FORMATS, Format, Layout, Table
from .roles import ConversionError, Net, Role, leaves, restaged

_INDEX = r"(?P<{}>0|[1-9]\d*)"
_SHOWN = 6
_CLOSEST = 3


@dataclasses.dataclass(frozen=True)
class Reading:
    """A state dict read as one format: the role of every key, and the keys that have none there."""

    format: Format
    layout: Layout
    stem: Table
    roles: Mapping[str, Role]
    net: Net
    unknown: tuple[str, ...]

    @functools.cached_property
    def problems(self) -> list[str]:
        """What keeps it from being a whole net, see `checks.problems`; missing tensors by this format's keys."""
        from .writing import spell

        return problems(self.net, lambda role: spell(role, self.format, self.layout, self.stem, self.net))


def shown(keys: Sequence[str]) -> str:
    """The first few keys, and how many more there are."""
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def read(tensors: Mapping[str, Tensor], form: Format, sizes: Sequence[int] | None = None) -> Reading:
    """Read ``tensors`` as ``form``, in the layout and with the stem that leave the fewest keys without a role.

    Args:
        sizes: blocks of each stage, for a format that counts its blocks through; None infers them.

    Raises:
        ConversionError: ``sizes`` do not add up to the number of blocks.
    """
    tried = [_read(tensors, form, layout, stem) for layout in form.layouts for stem in form.stems]
    best = min(tried, key=lambda reading: len(reading.unknown))
    if not form.flat:
        return best
    roles = restaged(best.roles, best.net, sizes)
    return dataclasses.replace(
        best, roles=roles, net=dataclasses.replace(best.net, tensors={r: tensors[k] for k, r in roles.items()})
    )


def _read(tensors: Mapping[str, Tensor], form: Format, layout: Layout, stem: Table) -> Reading:
    slots, roles = _names(stem), {}
    in_blocks: dict[tuple[int, int], dict[str, str]] = {}
    pattern = _pattern(layout.prefix + layout.where)
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        found = pattern.match(key)
        if found:
            place = found.groupdict()
            block = (int(place.get("stage", form.first_stage)) - form.first_stage, int(place.get("block", -1)))
            if "flat" in place:
                block = (0, int(place["flat"]))
            in_blocks.setdefault(block, {})[key] = key[found.end() :]
        elif module == layout.head and leaf in leaves("linear"):
            roles[key] = Role("head", 0, 0, "linear", leaf)
        elif layout.stem and module.startswith(layout.prefix):
            slot = slots.get(module[len(layout.prefix) :], "")
            if leaf in leaves(slot) and slot:
                roles[key] = Role("stem", 0, 0, slot, leaf)
    averages = False
    for block, rests in in_blocks.items():
        tried = [_read_block(block, rests, table) for table in form.tables]
        best = max(tried, key=len)
        averages |= best is not tried[0]
        roles.update(best if block[0] >= 0 else {})
    roles = {key: roles[key] for key in tensors if key in roles}  # in the state dict's own order
    net = Net({role: tensors[key] for key, role in roles.items()}, averages)
    return Reading(form, layout, stem, roles, net, tuple(key for key in tensors if key not in roles))


def _read_block(block: tuple[int, int], rests: Mapping[str, str], table: Table) -> dict[str, Role]:
    slots, found = _names(table), {}
    for key, rest in rests.items():
        module, _, leaf = rest.rpartition(".")
        slot = slots.get(module, "")
        if slot and leaf in leaves(slot):
            found[key] = Role("block", *block, slot, leaf)
    return found


def _names(table: Table) -> dict[str, str]:
    """Module names to slots."""
    return {name: slot for slot, names in table.items() for name in names.split("|")}


@functools.lru_cache(maxsize=64)
def _pattern(where: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", where)
    text = "".join(_INDEX.format(part) if i % 2 else re.escape(part) for i, part in enumerate(parts))
    return re.compile(text + r"\.")


def detect(
    tensors: Mapping[str, Tensor], strict: bool = True, sizes: Sequence[int] | None = None
) -> tuple[Reading, list[str]]:
    """The format that a state dict is in, and the names of other formats that read it to the same roles.

    Formats that agree on every role are one answer: the one whose models have what this net has, the first of
    `FORMATS` among equals.

    Args:
        strict: every key must have a role and the net be whole; else the formats that read the most keys.
        sizes: see `read`.

    Raises:
        ConversionError: no format fits, or several do that disagree.
    """
    readings = []
    for form in FORMATS.values():
        reading = read(tensors, form)
        if form.flat and sizes is not None and not reading.unknown:
            reading = read(tensors, form, sizes)
        readings.append(reading)
    readings.sort(key=lambda reading: len(reading.unknown))
    whole = [r for r in readings if not r.unknown and r.roles and not r.problems]
    if not whole and not strict:
        whole = [r for r in readings if r.net.blocks and len(r.unknown) == len(readings[0].unknown)]
    if not whole:
        raise ConversionError(_undetected(readings, len(tensors)))
    agreeing = [r for r in whole if r.roles == whole[0].roles and r.net.averages == whole[0].net.averages]
    if len(agreeing) < len(whole):
        names = ", ".join(r.format.name for r in whole)
        raise ConversionError(f"convert: src: these formats all read it, each differently: {names}; name the one it is")
    best = min(agreeing, key=lambda reading: len(unusual(reading.net, reading.format)))
    return best, [r.format.name for r in agreeing if r is not best]


def _undetected(readings: Sequence[Reading], count: int) -> str:
    lines = [f"convert: src: no format reads all {count} keys as a whole residual net; the closest:"]
    for reading in [r for r in readings if r.roles][:_CLOSEST]:
        if reading.unknown:
            lines.append(f"  {reading.format.name}: {len(reading.unknown)} not read: {shown(reading.unknown)}")
        else:
            lines.append(f"  {reading.format.name}: {'; '.join(reading.problems[:_SHOWN])}")
    if len(lines) == 1:
        lines.append(f"  none; it has {shown(readings[0].unknown) or 'no keys at all'}")
    return "\n".join(lines)
