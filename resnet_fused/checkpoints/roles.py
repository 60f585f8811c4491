"""The one form that every checkpoint format is read into: what each tensor of a residual net is, free of spelling.

A `Role` says where a tensor stands (stem, a block of a stage, head), in which layer there (its slot) and which of
the layer's tensors it is (its leaf):

    stem    conv1 norm1 [conv2 norm2 conv3 norm3] [pool.conv pool.norm]
    block   conv1 norm1 conv2 norm2 [conv3 norm3] [shortcut.conv [shortcut.norm]] [se.1 se.2 | eca]
    head    linear
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

COUNTER = "num_batches_tracked"
AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var", COUNTER)
NORM = (*AFFINE, *STATISTICS)


class ConversionError(ValueError):
    """A checkpoint that cannot be translated as asked, with the keys that are the reason."""


class Role(NamedTuple):
    """What one tensor is; ``stage`` and ``block`` count from 0 and are 0 outside blocks."""

    part: str
    stage: int
    block: int
    slot: str
    leaf: str

    @property
    def layer(self) -> tuple[str, int, int, str]:
        """All but the leaf."""
        return self[:4]

    @property
    def is_norm(self) -> bool:
        """Whether its layer is a normalisation."""
        return is_norm(self.slot)


def is_norm(slot: str) -> bool:
    """Whether a slot is a normalisation."""
    return slot.rpartition(".")[2].startswith("norm")


def leaves(slot: str) -> tuple[str, ...]:
    """The tensors that a layer may have, in the order of its own state dict."""
    return NORM if is_norm(slot) else AFFINE


@dataclasses.dataclass(frozen=True)
class Net:
    """The tensors of one net by role.

    ``averages``: whether a 2x2 average pool stands in front of the shortcut's convolution where it strides.
    """

    tensors: Mapping[Role, Tensor]
    averages: bool = False

    def where(self, part: str, leaf: str | None = None) -> list[Role]:
        """The roles of a part, and of one leaf if it is given."""
        return [role for role in self.tensors if role.part == part and leaf in (None, role.leaf)]

    @functools.cached_property
    def blocks(self) -> list[tuple[int, int]]:
        """(stage, block) of every block, in order."""
        return sorted({(role.stage, role.block) for role in self.tensors if role.part == "block"})

    @functools.cached_property
    def stages(self) -> tuple[int, ...]:
        """The number of blocks in each stage."""
        blocks = self.blocks
        return tuple(sum(stage == s for s, _ in blocks) for stage in range(1 + max((s for s, _ in blocks), default=-1)))

    @functools.cached_property
    def convolutions(self) -> dict[int, int]:
        """How many convolutions the main path of a block has, by stage."""
        counts: dict[int, int] = {}
        for role in self.where("block"):
            if role.slot[:-1] in ("conv", "norm"):
                counts[role.stage] = max(counts.get(role.stage, 0), int(role.slot[-1]))
        return counts

    @functools.cached_property
    def stem_convolutions(self) -> int:
        """How many convolutions stand before the first batch norm of the blocks, a pooling one aside."""
        return len({role.slot for role in self.where("stem") if role.slot[:-1] == "conv"})

    def shape(self, block: tuple[int, int], slot: str) -> tuple[int, ...]:
        """The shape of a convolution's weight in a block; empty where there is none."""
        weight = self.tensors.get(Role("block", *block, slot, "weight"))
        return () if weight is None else tuple(weight.shape)

    def channels(self, block: tuple[int, int]) -> tuple[int, int] | None:
        """Input and output channels of a block; None where its convolutions are not all there."""
        first, last = self.shape(block, "conv1"), self.shape(block, f"conv{self.convolutions.get(block[0], 0)}")
        return (first[1], last[0]) if len(first) == len(last) == 4 else None

    @functools.cached_property
    def unprojected(self) -> list[tuple[int, int]]:
        """The blocks that change the number of channels and have no projection: option A, or a plain net."""
        found = []
        for block in self.blocks:
            channels = self.channels(block)
            if channels is not None and channels[0] != channels[1] and not self.shape(block, "shortcut.conv"):
                found.append(block)
        return found

    @functools.cached_property
    def has_biases(self) -> bool:
        """Whether convolutions have biases."""
        return any(role.leaf == "bias" and "conv" in role.slot for role in self.tensors)

    def has(self, part: str, slot: str) -> bool:
        """Whether any tensor stands in this slot of this part."""
        return any(role.part == part and role.slot == slot for role in self.tensors)


def restaged(roles: Mapping[str, Role], net: Net, sizes: Iterable[int] | None) -> dict[str, Role]:
    """Roles whose blocks were counted through (all in stage 0), with the blocks dealt to stages.

    ``sizes`` None infers them: a stage begins where the channels change and, unless every block has one, at a
    projection.

    Raises:
        ConversionError: ``sizes`` do not add up to the number of blocks.
    """
    blocks = net.blocks
    given = None if sizes is None else tuple(sizes)
    if given is not None and (sum(given) != len(blocks) or min(given, default=0) < 1):
        raise ConversionError(f"convert: stages: expected sizes that add up to {len(blocks)} blocks, got {given}")
    starts = _starts(net) if given is None else [sum(given[:i]) for i in range(len(given))]
    places, stage = {}, -1
    for i, (_, flat) in enumerate(blocks):
        stage += i in starts
        places[flat] = (stage, i - starts[stage])
    return {
        key: role._replace(stage=places[role.block][0], block=places[role.block][1]) if role.part == "block" else role
        for key, role in roles.items()
    }


def _starts(net: Net) -> list[int]:
    blocks = net.blocks
    projected = [bool(net.shape(block, "shortcut.conv")) for block in blocks]
    starts = []
    for i, block in enumerate(blocks):
        channels, before = net.channels(block), net.channels(blocks[i - 1]) if i else None
        changed = channels is not None and before is not None and channels[1] != before[1]
        if i == 0 or changed or (projected[i] and not all(projected)):
            starts.append(i)
    return starts
