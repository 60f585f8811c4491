"""Roles to keys: where a format puts each tensor, and in which order."""

from __future__ import annotations

from .formats import Format, Layout, Table
from .roles import Net, Role, leaves


def choose(net: Net, form: Format) -> tuple[Layout, Table]:
    """The layout and the stem's table in which ``form`` holds the most of ``net``."""
    head, stem = bool(net.where("head")), bool(net.where(part="stem"))
    layouts = [layout for layout in form.layouts if layout.stem or not stem]
    layout = next((found for found in layouts if found.head or not head), layouts[0])
    return layout, next((table for table in form.stems if stem_fits(table, net)), form.stems[0])


def stem_fits(table: Table, net: Net) -> bool:
    """Whether the stem of ``table`` has as many convolutions as the net's."""
    return sum(slot[:-1] == "conv" for slot in table) == net.stem_convolutions


def spell(role: Role, form: Format, layout: Layout, stem: Table, net: Net) -> str | None:
    """The key of ``role``; None where the format has no place for it."""
    if role.part == "head":
        return None if layout.head is None else f"{layout.head}.{role.leaf}"
    if role.part == "stem":
        name = stem.get(role.slot) if layout.stem else None
        return None if name is None else f"{layout.prefix}{name.split('|')[0]}.{role.leaf}"
    name = _block_table(role, form, net).get(role.slot)
    if name is None:
        return None
    where = layout.where.format(
        stage=role.stage + form.first_stage, block=role.block, flat=sum(net.stages[: role.stage]) + role.block
    )
    return f"{layout.prefix}{where}.{name.split('|')[0]}.{role.leaf}"


def _block_table(role: Role, form: Format, net: Net) -> Table:
    averages = net.averages and form.averaged is not None and (form.averages_all or role.stage > 0)
    return form.averaged if averages and form.averaged is not None else form.block


def in_order(net: Net, form: Format, stem: Table) -> list[Role]:
    """The roles of ``net`` in the order of the state dict of ``form``'s own model."""
    parts = {"stem": 0, "block": 1, "head": 2}

    def place(role: Role) -> tuple[int, ...]:
        table = stem if role.part == "stem" else _block_table(role, form, net)
        slots = list(table)
        slot = slots.index(role.slot) if role.slot in table else len(slots)
        return (parts[role.part], role.stage, role.block, slot, leaves(role.slot).index(role.leaf))

    return sorted(net.tensors, key=place)
