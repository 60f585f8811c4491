"""What a chain is, in words only: no tensor, no module, no torch.

A chain is a run of sites (convolution + batch norm + optional ReLU), a shortcut, and a final add and
ReLU, or a max pool. Every block of the residual family is one. Modules are named by their attribute
path inside the block (``"conv1"``, ``"downsample.0"``), so a spec is picklable, comparable, and stays
right when a child is replaced, as ``SyncBatchNorm.convert_sync_batchnorm`` does.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Pair = tuple[int, int]
ShortcutKind = Literal["none", "identity", "pad", "projection"]


@dataclasses.dataclass(frozen=True)
class SiteSpec:
    """One convolution, the batch norm on its output, and whether a ReLU follows directly.

    ``bn`` is None only in a projection shortcut without batch norm.
    """

    conv: str
    bn: str | None
    relu: bool = True


@dataclasses.dataclass(frozen=True)
class ShortcutSpec:
    """The skip connection of a block.

    ``identity``: the block's input. ``pad``: option A, the input subsampled by ``stride`` and
    zero-padded to the output's channels with ``channel_offset`` of the zeros in front (0: the
    paper's text; a quarter of the output's channels: the symmetric convention). ``projection``:
    ``site``, a convolution with or without batch norm.
    """

    kind: ShortcutKind = "none"
    site: SiteSpec | None = None
    stride: int = 1
    channel_offset: int = 0


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """Max pool at the end of a stem."""

    kernel: Pair
    stride: Pair
    padding: Pair


@dataclasses.dataclass(frozen=True)
class ChainSpec:
    """A block as a chain.

    Args:
        sites: at least one; each but the last is read by the next one alone.
        shortcut: what is added to the last site's batch norm output.
        relu: whether a ReLU follows the add (without a shortcut, the last site's own ``relu`` is used).
        inplace_add: ``out += shortcut`` keeps the dtype of ``out``; ``out + shortcut`` promotes.
        pool: a max pool after the last ReLU; only without a shortcut.
        inner: paths of the other modules the block calls (activations, identities, containers):
            a hook on any of them must still fire, so it makes the block run as it was written.
    """

    sites: tuple[SiteSpec, ...]
    shortcut: ShortcutSpec = ShortcutSpec()
    relu: bool = True
    inplace_add: bool = True
    pool: PoolSpec | None = None
    inner: tuple[str, ...] = ()

    def site_specs(self) -> tuple[SiteSpec, ...]:
        """The sites of the main path, then the projection if there is one."""
        return self.sites if self.shortcut.site is None else (*self.sites, self.shortcut.site)

    def paths(self) -> tuple[str, ...]:
        """Every module path the chain reads or stands for."""
        own = [path for site in self.site_specs() for path in (site.conv, site.bn) if path]
        return (*own, *self.inner)
