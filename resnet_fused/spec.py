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
ShortcutKind = Literal["none", "identity", "pad", "projection", "module"]


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
    ``site``, a convolution with or without batch norm. ``first``: its batch norm is one of the main path's
    too and is used before it, so that its statistics move first; recorded only where that matters. ``module``:
    whatever the submodule at ``path`` returns for the block's input; it is called as it is, and only what follows is
    part of the chain.
    """

    kind: ShortcutKind = "none"
    site: SiteSpec | None = None
    stride: int = 1
    channel_offset: int = 0
    first: bool = False
    path: str = ""


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """Max pool at the end of a stem."""

    kernel: Pair
    stride: Pair
    padding: Pair


@dataclasses.dataclass(frozen=True)
class ChainSpec:
    """A block as a chain.

    One batch norm may stand for several sites, and after the add: its statistics then move at every use, in
    the order of `uses`. Such a block, or one with a batch norm after the add, is *literal*.

    Args:
        sites: at least one; each but the last is read by the next one alone.
        shortcut: what is added to the last site's batch norm output.
        relu: whether a ReLU follows the add (without a shortcut, the last site's own ``relu`` is used).
        inplace_add: ``out += shortcut`` keeps the dtype of ``out``; ``out + shortcut`` promotes.
        pool: a max pool after the last ReLU; only without a shortcut.
        post: a batch norm between the add and its ReLU; only with a shortcut.
        inner: paths of the other modules the block calls (activations, identities, containers):
            a hook on any of them must still fire, so it makes the block run as it was written.
    """

    sites: tuple[SiteSpec, ...]
    shortcut: ShortcutSpec = ShortcutSpec()
    relu: bool = True
    inplace_add: bool = True
    pool: PoolSpec | None = None
    inner: tuple[str, ...] = ()
    post: str | None = None

    def site_specs(self) -> tuple[SiteSpec, ...]:
        """The sites of the main path, then the projection if there is one."""
        return self.sites if self.shortcut.site is None else (*self.sites, self.shortcut.site)

    def uses(self) -> tuple[tuple[str, str], ...]:
        """Every use of a batch norm in the order of execution, with its convolution; ``""`` after the add."""
        main = [(site.bn, site.conv) for site in self.sites]
        branch = [] if self.shortcut.site is None else [(self.shortcut.site.bn, self.shortcut.site.conv)]
        uses = branch + main if self.shortcut.first else main + branch
        return tuple((bn, conv) for bn, conv in (*uses, (self.post, "")) if bn is not None)

    def norms(self) -> tuple[str, ...]:
        """The batch norms of `uses`; one that is shared is there as often as it is used."""
        return tuple(bn for bn, _ in self.uses())

    def shared_norms(self) -> dict[str, int]:
        """The batch norms that are used more than once, and how often."""
        uses = self.norms()
        return {path: uses.count(path) for path in uses if uses.count(path) > 1}

    def is_literal(self) -> bool:
        """Whether a batch norm is shared, or stands after the add."""
        return self.post is not None or len(set(self.norms())) < len(self.norms())

    def paths(self) -> tuple[str, ...]:
        """Every module path the chain reads or stands for; a shared batch norm's once."""
        own = [path for site in self.site_specs() for path in (site.conv, site.bn)]
        return tuple(dict.fromkeys(path for path in (*own, self.post, *self.inner) if path))
