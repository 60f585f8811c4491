"""The CPU engine: the primitives of `resnet_fused.reference` in the C++ library ``resnet_fused._cpu``.

Activations are float32, bfloat16, float16 or float64; per-channel values are float32, or float64 for
float64 activations. Inputs that are not channels_last are copied first; outputs always are. The
convolutions are PyTorch's own, but for small ones inside a whole site (`cpu_site`). The library may be
absent (a pure-Python install): importing this module then still works, `load` says why, and calling a
primitive raises RuntimeError with the reason. Every primitive raises RuntimeError naming the op, the
argument, what was expected and what came.

RESNET_FUSED_CPU_ISA (baseline, avx2, avx512, avx512_bf16 or amx) overrides the instruction set chosen at run time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.engines import cpu_plan, cpu_site
from resnet_fused.reference import Pair, conv_bwd, conv_fwd, opmath

__all__ = [
    "bn_apply",
    "bn_bwd_apply",
    "bn_bwd_finalize",
    "bn_bwd_reduce",
    "bn_bwd_reduce_rebuild",
    "bn_eval_moments",
    "bn_finalize",
    "bn_stats",
    "conv_bwd",
    "conv_fwd",
    "isa",
    "join_bwd_reduce",
    "load",
    "pool_apply",
    "pool_bwd",
    "release_memory",
    "set_isa",
    "unkept_memory",
]

_OPS = (
    "bn_stats",
    "bn_finalize",
    "bn_eval_moments",
    "bn_apply",
    "bn_bwd_reduce",
    "bn_bwd_reduce_rebuild",
    "join_bwd_reduce",
    "bn_bwd_finalize",
    "bn_bwd_apply",
    "pool_apply",
    "pool_bwd",
    "cpu_isa",
    "set_cpu_isa",
)


def _missing(*_args: object, **_kwargs: object) -> Any:
    raise RuntimeError(f"resnet_fused.engines.cpu: {load()}")


# Each op's overload, bound once by `load`: a call then costs no look-up in torch.ops.
_bn_stats: Callable[..., Any] = _missing
_bn_finalize: Callable[..., Any] = _missing
_bn_eval_moments: Callable[..., Any] = _missing
_bn_apply: Callable[..., Any] = _missing
_bn_bwd_reduce: Callable[..., Any] = _missing
_bn_bwd_reduce_rebuild: Callable[..., Any] = _missing
_join_bwd_reduce: Callable[..., Any] = _missing
_bn_bwd_finalize: Callable[..., Any] = _missing
_bn_bwd_apply: Callable[..., Any] = _missing
_pool_apply: Callable[..., Any] = _missing
_pool_bwd: Callable[..., Any] = _missing
_cpu_isa: Callable[..., Any] = _missing
_set_cpu_isa: Callable[..., Any] = _missing


@functools.cache
def load() -> str | None:
    """Load the library if it is not loaded yet; None, or the reason why it cannot be used, in words."""
    package = Path(__file__).resolve().parent.parent
    libraries = sorted(package.glob("_cpu*.so"))
    if not libraries:
        return (
            f"the CPU library is not built (no _cpu*.so in {package}); reinstall with a C++ compiler and "
            "--no-build-isolation, and see the configuration that setup.py prints"
        )
    try:
        torch.ops.load_library(str(libraries[0]))
        torch.ops.resnet_fused.cpu_isa.default()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"the CPU library {libraries[0]} cannot be used with torch {torch.__version__}: {error}"
    for name in _OPS:
        globals()[f"_{name}"] = getattr(torch.ops.resnet_fused, name).default
    _register_fakes()
    cpu_plan.register(_cpu_isa)
    cpu_site.register()
    if cpu_site.infers():
        globals().update(site_infer=cpu_site.site_infer, folds_itself=cpu_site.folds_itself)
    return None


def isa() -> str:
    """The instruction set in use, one of the names above. Raises RuntimeError without the library."""
    return _cpu_isa()


def set_isa(name: str) -> None:
    """Use instruction set ``name`` from now on; for tests. Raises RuntimeError if the machine lacks it."""
    _set_cpu_isa(name)


def release_memory() -> int:
    """Give the memory kept for the next step's activations back to the operating system; how many bytes it was.

    Fused blocks on the CPU keep the memory of large activations from one step to the next, never more than they had in
    use at once (``RESNET_FUSED_KEEP_MEMORY=0`` in the environment: none). Tensors in use are not touched. The profiler
    of torch does not see memory that is kept.

    Equivalent to: ``torch.cuda.empty_cache()``, for the CPU engine.
    """
    ops = torch.ops.resnet_fused
    return ops.release_memory() if load() is None and hasattr(ops, "release_memory") else 0


@contextlib.contextmanager
def unkept_memory() -> Iterator[None]:
    """Within it every activation is allocated by torch, whose profiler then sees it; what was kept is given back."""
    ops = torch.ops.resnet_fused
    if load() is not None or not hasattr(ops, "keep_memory"):
        yield
        return
    before = ops.keep_memory(False)
    ops.release_memory()
    try:
        yield
    finally:
        ops.keep_memory(before)


def bn_stats(y: Tensor) -> Tensor:
    """Partial statistics ``(1, 3, C)``. See `reference.bn_stats`."""
    return _bn_stats(y)


def bn_finalize(
    partials: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Moments ``(5, C)`` of a batch; moves the running buffers in place. See `reference.bn_finalize`."""
    return _bn_finalize(
        partials, weight, bias, conv_bias, running_mean, running_var, num_batches_tracked, momentum, eps
    )


def bn_eval_moments(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Moments ``(5, C)`` of running statistics. See `reference.bn_eval_moments`."""
    return _bn_eval_moments(running_mean, running_var, weight, bias, conv_bias, eps, dtype)


def bn_apply(
    y: Tensor,
    moments: Tensor,
    residual: Tensor | None,
    residual_moments: Tensor | None,
    residual_stride: int,
    channel_offset: int,
    relu: bool,
) -> Tensor:
    """``act(z + shortcut)``. See `reference.bn_apply`."""
    return _bn_apply(y, moments, residual, residual_moments, residual_stride, channel_offset, relu)


def bn_bwd_reduce(dout: Tensor, y: Tensor, moments: Tensor, relu: bool) -> Tensor:
    """``sums`` ``(2, C)``. See `reference.bn_bwd_reduce`."""
    return _bn_bwd_reduce(dout, y, moments, relu)


def bn_bwd_reduce_rebuild(dout: Tensor, y: Tensor, moments: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """``(sums, act)`` in one pass. See `reference.bn_bwd_reduce_rebuild`."""
    return _bn_bwd_reduce_rebuild(dout, y, moments, relu)


def join_bwd_reduce(
    dout: Tensor,
    dskip: Tensor | None,
    out: Tensor | None,
    y: Tensor,
    moments: Tensor,
    residual_y: Tensor | None,
    residual_moments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(g, sums, residual_sums)``. See `reference.join_bwd_reduce`."""
    return _join_bwd_reduce(dout, dskip, out, y, moments, residual_y, residual_moments)


def bn_bwd_finalize(sums: Tensor, moments: Tensor, training: bool) -> Tensor:
    """Coefficients ``(3, C)``, or ``(1, C)`` of running statistics. See `reference.bn_bwd_finalize`."""
    return _bn_bwd_finalize(sums, moments, training)


def bn_bwd_apply(g: Tensor, y: Tensor, moments: Tensor, coef: Tensor, relu: bool) -> Tensor:
    """``dy``. See `reference.bn_bwd_apply`."""
    return _bn_bwd_apply(g, y, moments, coef, relu)


def pool_apply(y: Tensor, moments: Tensor, kernel: Pair, stride: Pair, padding: Pair, relu: bool) -> Tensor:
    """Max pool of ``act(z)``. See `reference.pool_apply`."""
    return _pool_apply(y, moments, kernel, stride, padding, relu)


def pool_bwd(
    dout: Tensor, y: Tensor, moments: Tensor, kernel: Pair, stride: Pair, padding: Pair, relu: bool
) -> tuple[Tensor, Tensor]:
    """``(g, sums)``. See `reference.pool_bwd`."""
    return _pool_bwd(dout, y, moments, kernel, stride, padding, relu)


def _empty_channels_last(y: Tensor, height: Any, width: Any) -> Tensor:
    n, c = y.shape[:2]
    return y.new_empty_strided((n, c, height, width), (height * width * c, 1, width * c, c))


def _register_fakes() -> None:
    """Shapes, dtypes and strides of the outputs, so that torch.compile can trace the ops."""

    def like(y: Tensor) -> Tensor:
        return _empty_channels_last(y, *y.shape[2:])

    def table(rows: int, of: Tensor) -> Tensor:
        return of.new_empty((rows, of.shape[-1]))

    def stats(y: Tensor) -> Tensor:
        return y.new_empty((1, 3, y.shape[1]), dtype=opmath(y.dtype))

    def pooled(y: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
        size = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(y.shape[2:], kernel, stride, padding)]
        return _empty_channels_last(y, *size)

    def residual_sums(moments: Tensor, residual_y: Tensor | None, residual_moments: Tensor | None) -> Tensor:
        projection = residual_y is not None and residual_moments is not None
        return table(2, moments) if projection else moments.new_empty(0)

    fakes: dict[str, Callable[..., Any]] = {
        "bn_stats": stats,
        "bn_finalize": lambda partials, *rest: table(5, partials),
        "bn_eval_moments": lambda mean, var, weight, bias, conv_bias, eps, dtype: mean.new_empty(
            (5, mean.shape[0]), dtype=dtype
        ),
        "bn_apply": lambda y, *rest: like(y),
        "bn_bwd_reduce": lambda dout, y, moments, relu: table(2, moments),
        "bn_bwd_reduce_rebuild": lambda dout, y, moments, relu: (table(2, moments), like(y)),
        "join_bwd_reduce": lambda dout, dskip, out, y, moments, residual_y, residual_moments: (
            like(y),
            table(2, moments),
            residual_sums(moments, residual_y, residual_moments),
        ),
        "bn_bwd_finalize": lambda sums, moments, training: table(3 if training else 1, moments),
        "bn_bwd_apply": lambda g, y, *rest: like(y),
        "pool_apply": lambda y, moments, kernel, stride, padding, relu: pooled(y, kernel, stride, padding),
        "pool_bwd": lambda dout, y, moments, *rest: (like(y), table(2, moments)),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"resnet_fused::{name}", fake)


load()
