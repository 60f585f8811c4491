"""What `explain` says of a fused block besides its plan."""

from __future__ import annotations

from typing import Any

from . import synchronise
from .folded import FOLDED
from .links import child
from .register import registration
from .spec import ChainSpec


def remarks(block: Any, spec: ChainSpec, memory: str, origin: str | None = None) -> list[str]:
    """How the chain was found, what batch norms are shared, and which parameters the forward never uses.

    ``origin`` is how, where the chain is a part of ``block`` alone, as a network's stem is.
    """
    shared = spec.shared_norms()
    found = [origin or ("recognised" if registration(block) is None else "registered")]
    found += [f"batch norm '{path}' is used {times} times: literal mode" for path, times in shared.items()]
    if spec.post is not None and spec.post not in shared:
        found.append(f"batch norm '{spec.post}' follows the add: literal mode")
    if spec.is_literal() and memory != "speed":
        found.append('kept for backward as in "speed"')
    used = {spec.post, *(path for site in spec.site_specs() for path in (site.conv, site.bn))}
    branch = f"{spec.shortcut.path}." if spec.shortcut.path else ()
    owners = ((name, name.rpartition(".")[0]) for name, _ in block.named_parameters())
    dead = [name for name, owner in owners if owner not in used and not f"{owner}.".startswith(branch)]
    if dead and origin is None:
        found.append(f"{', '.join(dead)} never used: DDP needs find_unused_parameters=True")
    if FOLDED in block.__dict__:
        found.append("folded for inference")
    norms = synchronise.describe([child(block, path) for path in spec.norms()])
    if norms is not None:
        found.append(norms)
    return found
