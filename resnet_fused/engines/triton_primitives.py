"""The primitives of `resnet_fused.reference` as Triton kernels, each with a way out where it cannot compile.

A kernel that the compiler refuses on the user's device is replaced by the reference primitive from then on, with one
warning that says why. The convolutions are the vendor's; ours are in `triton_site`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from .. import reference
from ..kernels import bn_apply as _apply
from ..kernels import bn_bwd as _bwd
from ..kernels import bn_finalize as _finalize
from ..kernels import bn_stats as _stats
from ..kernels import join_bwd as _join
from ..kernels import pool as _pool
from ..reference import conv_bwd, conv_fwd

# What Triton raises at a launch when a kernel cannot be built for the device, and not when its arguments are wrong.
COMPILE_ERRORS = (CompilationError, OutOfResources, PTXASError)

broken: dict[str, str] = {}  # primitive to the reason why the reference stands in for it


def notice(what: str, error: Exception, instead: str) -> str:
    """Say once what does not compile here and what runs instead; returns the reason."""
    first = str(error).strip().split(chr(10))[0]
    reason = f"{type(error).__name__}: {first}"
    warnings.warn(f"resnet_fused: {what} does not compile here ({reason}); {instead} runs instead", stacklevel=3)
    return reason


def _guarded(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """``launcher``, or the reference primitive once it has failed to compile."""
    fallback = getattr(reference, name)

    @functools.wraps(launcher)
    def primitive(*args: Any) -> Any:
        if name not in broken:
            try:
                return launcher(*args)
            except COMPILE_ERRORS as error:
                broken[name] = notice(f"the kernel of {name}", error, "plain PyTorch")
        return fallback(*args)

    return primitive


bn_stats = _guarded("bn_stats", _stats.bn_stats)
bn_finalize = _guarded("bn_finalize", _finalize.bn_finalize)
bn_eval_moments = _guarded("bn_eval_moments", _finalize.bn_eval_moments)
bn_apply = _guarded("bn_apply", _apply.bn_apply)
bn_bwd_reduce = _guarded("bn_bwd_reduce", _bwd.bn_bwd_reduce)
bn_bwd_reduce_rebuild = _guarded("bn_bwd_reduce_rebuild", _bwd.bn_bwd_reduce_rebuild)
join_bwd_reduce = _guarded("join_bwd_reduce", _join.join_bwd_reduce)
bn_bwd_finalize = _guarded("bn_bwd_finalize", _bwd.bn_bwd_finalize)
bn_bwd_apply = _guarded("bn_bwd_apply", _bwd.bn_bwd_apply)
pool_apply = _guarded("pool_apply", _pool.pool_apply)
pool_bwd = _guarded("pool_bwd", _pool.pool_bwd)

__all__ = ["COMPILE_ERRORS", "broken", "conv_bwd", "conv_fwd", "notice"]
