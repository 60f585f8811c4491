"""What a format has a place for, and what may be left out."""

from __future__ import annotations

from collections.abc import Sequence

from .formats import Format
from .roles import COUNTER, ConversionError, Net, Role
from .writing import choose, spell, stem_fits

AVERAGE = "avgpool"
DROPPABLE = ("fc", "stem", "stem.norm", "pool", "se", "shortcut", "shortcut.norm", "bias", COUNTER, AVERAGE)
ASKED = "asked for"
_WORDS = {
    "fc": "a classifier",
    "se": "channel attention",
    "stem": "this stem",
    "stem.norm": "the stem's batch norm",
    "pool": "a strided convolution for the stem's pool",
    "shortcut.norm": "batch norms in shortcuts",
}


def fit(net: Net, target: Format, drop: Sequence[str], counters: bool) -> tuple[Net, dict[Role, str]]:
    """What of ``net`` goes into ``target``, and for every other role the reason.

    Args:
        drop: members of `DROPPABLE` that may be left out; others in it are ignored.
        counters: whether the target has batch counters.

    Raises:
        ConversionError: the target has no place for something that ``drop`` does not name.
    """
    dropped = {role: ASKED for role in net.tensors for part in drop if _is(role, part)}
    if not counters:
        nature = f"{target.name}'s batch norms have none"
        dropped.update({r: nature for r in net.tensors if r.leaf == COUNTER and r not in dropped})
    kept = Net({role: tensor for role, tensor in net.tensors.items() if role not in dropped}, net.averages)
    if net.averages and target.averaged is None and kept.has("block", "shortcut.conv"):
        if AVERAGE not in drop:
            raise ConversionError(
                f"convert: dst: {target.name} has no shortcut that averages before its 1x1 convolution, as this net "
                f"has (timm's D variants); drop={AVERAGE!r} converts it all the same, to a net that computes otherwise"
            )
        kept = Net(kept.tensors)
    layout, stem = choose(kept, target)
    homeless = {role for role in kept.tensors if spell(role, target, layout, stem, kept) is None}
    if homeless:
        parts = tuple(sorted({_part(role, stem_fits(stem, kept)) for role in homeless}))
        what = ", ".join(f"{_WORDS.get(part, part)} ({part})" for part in parts)
        ask = repr(parts[0] if len(parts) == 1 else parts)
        raise ConversionError(
            f"convert: dst: {target.name} has no place for {what}; drop={ask} leaves out what it lacks"
        )
    return kept, dropped


def _is(role: Role, part: str) -> bool:
    """Whether a role belongs to one of `DROPPABLE`."""
    if part == "fc":
        return role.part == "head"
    if part in ("stem", "stem.norm"):
        return role.part == "stem" and (part == "stem" or role.is_norm)
    if part in ("bias", COUNTER):
        return role.leaf == part and (part == COUNTER or "conv" in role.slot)
    if part == "se":
        return role.slot in ("se.1", "se.2", "eca")
    return role.slot == part or role.slot.startswith(f"{part}.")


def _part(role: Role, stem_fits: bool) -> str:
    """The narrowest of `DROPPABLE` that a homeless role belongs to."""
    if role.part == "stem" and role.slot[:-1] in ("conv", "norm"):
        return "stem.norm" if stem_fits and role.is_norm else "stem"
    return next((part for part in ("fc", "se", "pool", "shortcut.norm", "shortcut") if _is(role, part)), role.slot)
