"""Whether a set of roles is a whole residual net, and whether a format's own models look like it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .formats import Format
from .roles import NORM, Net, Role, is_norm

Spell = Callable[[Role], str | None]


def problems(net: Net, spell: Spell) -> list[str]:
    """What is missing from ``net`` or contradicts itself, each in a few words; empty for a whole net.

    A layer that has one tensor has all that its kind has elsewhere in the net; blocks are alike; channels fit.

    Args:
        spell: the key of a role, for the words.
    """

    def name(role: Role) -> str:
        return spell(role) or ".".join(map(str, role))

    missing = sorted({role for role in _missing(net) if role not in net.tensors})
    return [f"{name(role)} is missing" for role in missing] or [*_misfits(net, name)]


def _missing(net: Net) -> Iterator[Role]:
    blocks = net.blocks
    if not blocks:
        yield Role("block", 0, 0, "conv1", "weight")
    yield from _gaps(net)
    norms = {role.leaf for role in net.tensors if role.is_norm}
    norm_leaves = [leaf for leaf in NORM if leaf in norms]
    conv_leaves = ["weight", "bias"] if net.has_biases else ["weight"]

    def layer(part: str, place: tuple[int, int], slot: str) -> Iterator[Role]:
        wanted = (norm_leaves or ["weight"]) if is_norm(slot) else conv_leaves
        if slot.startswith(("se.", "pool.conv", "eca", "linear")):
            own = {role.leaf for role in net.tensors if (role.part, role.slot) == (part, slot)}
            wanted = ["weight", "bias"] if slot == "linear" else sorted({"weight", *own}, reverse=True)
        for leaf in wanted:
            yield Role(part, *place, slot, leaf)

    for part, place, slot in _layers(net, blocks):
        yield from layer(part, place, slot)


def _layers(net: Net, blocks: list[tuple[int, int]]) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Every layer that a net with these parts has."""
    present = {role.layer for role in net.tensors}
    stem = {slot for part, _, _, slot in present if part == "stem"}
    convolutions = max((int(slot[-1]) for slot in stem if not slot.startswith("pool")), default=0)
    kinds = ["conv", "norm"] if any(is_norm(slot) and not slot.startswith("pool") for slot in stem) else ["conv"]
    wanted = {f"{kind}{k}" for k in range(1, convolutions + 1) for kind in kinds}
    if any(slot.startswith("pool") for slot in stem):
        wanted |= {"pool.conv", "pool.norm"}
    for slot in wanted:
        yield "stem", (0, 0), slot
    in_blocks = {slot for part, _, _, slot in present if part == "block"}
    everywhere = {slot for slot in in_blocks if slot.startswith(("se.", "eca"))}
    if any(slot.startswith("se.") for slot in in_blocks):
        everywhere |= {"se.1", "se.2"}
    projection = ["shortcut.conv", *(["shortcut.norm"] if "shortcut.norm" in in_blocks else [])]
    projected = {(s, b) for part, s, b, slot in present if part == "block" and slot.startswith("shortcut.")}
    changed = set(net.unprojected)
    if any(_changes(net, block) for block in projected):
        projected |= changed
    for block in blocks:
        numbers = range(1, max(net.convolutions.get(block[0], 0), 2) + 1)
        main = [f"{kind}{k}" for k in numbers for kind in ("conv", "norm")]
        for slot in [*main, *sorted(everywhere), *(projection if block in projected else [])]:
            yield "block", block, slot
    if any(part == "head" for part, *_ in present):
        yield "head", (0, 0), "linear"


def _changes(net: Net, block: tuple[int, int]) -> bool:
    channels = net.channels(block)
    return channels is not None and channels[0] != channels[1]


def _gaps(net: Net) -> Iterator[Role]:
    """The first tensor of every block that is not there though a later one is."""
    blocks = set(net.blocks)
    for stage in range(1 + max((s for s, _ in blocks), default=-1)):
        for block in range(max((b for s, b in blocks if s == stage), default=0)):
            if (stage, block) not in blocks:
                yield Role("block", stage, block, "conv1", "weight")
        if not any(s == stage for s, _ in blocks):
            yield Role("block", stage, 0, "conv1", "weight")


def _misfits(net: Net, name: Callable[[Role], str]) -> Iterator[str]:
    """Shapes that do not fit each other."""
    for role, tensor in net.tensors.items():
        dimensions = 0 if role.leaf == "num_batches_tracked" else 1
        if role.leaf == "weight" and not role.is_norm:
            dimensions = 2 if role.part == "head" else 3 if role.slot == "eca" else 4
        if tensor.dim() != dimensions:
            yield f"{name(role)}: expected {dimensions} dimensions, got shape {tuple(tensor.shape)}"
            return
    for role, tensor in net.tensors.items():
        weight = role._replace(slot=role.slot.replace("norm", "conv"), leaf="weight")
        if tensor.dim() == 1 and weight in net.tensors and len(tensor) != net.tensors[weight].shape[0]:
            yield f"{name(role)}: expected {net.tensors[weight].shape[0]} values, as {name(weight)}, got {len(tensor)}"
    stem = [net.tensors[r].shape[0] for r in sorted(net.where("stem", leaf="weight")) if not r.is_norm]
    channels = stem[-1] if stem else None
    for block in net.blocks:
        ends = net.channels(block)
        if ends is None:
            continue
        shortcut = net.shape(block, "shortcut.conv")
        first = Role("block", *block, "conv1", "weight")
        if channels is not None and ends[0] != channels:
            yield f"{name(first)}: expected {channels} input channels, got {ends[0]}"
        if shortcut and (shortcut[1], shortcut[0]) != ends:
            role = Role("block", *block, "shortcut.conv", "weight")
            yield f"{name(role)}: expected {ends[0]} to {ends[1]} channels, got {shortcut[1]} to {shortcut[0]}"
        channels = ends[1]
    for role in net.where("head", leaf="weight"):
        if channels is not None and net.tensors[role].shape[1] != channels:
            yield f"{name(role)}: expected {channels} input features, got {net.tensors[role].shape[1]}"


def unusual(net: Net, form: Format) -> list[str]:
    """In what ``net`` differs from the models that use ``form``, as sentences for a reader."""
    found = []
    stem, shortcuts = bool(net.where("stem")), net.has("block", "shortcut.conv")
    own: Iterable[tuple[bool | None, bool, bool, str]] = (
        (form.biases, net.has_biases, True, "biases in the convolutions"),
        (form.stem_norm, net.has("stem", "norm1"), stem, "a batch norm in the stem"),
        (form.shortcut_norm, net.has("block", "shortcut.norm"), shortcuts, "batch norms in the shortcuts"),
    )
    for theirs, ours, applies, what in own:
        if theirs is not None and applies and theirs != ours:
            found.append(
                f"{form.name}'s models have {'' if theirs else 'no '}{what}, this net has {'' if ours else 'no '}such"
            )
    if form.pads is False and net.unprojected:
        stage, block = net.unprojected[0]
        found.append(
            f"{form.name}'s models project wherever the channels change; this net pads with zeros (option A) or "
            f"is plain, first in block {block} of stage {stage + 1}"
        )
    return found
