"""The projection shortcut, fused: ops of the C++ libraries ``resnet_fused._cpu`` and ``resnet_fused._cuda``.

One set of schemas, kernels for CPU tensors in the one library and for CUDA tensors in the other, so that a CPU-only
torch loads what it can. Activations are float32, bfloat16 or float16, on the CPU also float64; what is not
channels_last is copied first, outputs always are. On CUDA, float32 products follow cuDNN's TF32 setting; compute
capability 7.5 or newer is needed, and a build has code for 7.5 only where TORCH_CUDA_ARCH_LIST names it: there only
float16 runs on tensor cores, all else by exact float32 products, TF32 too. Either library may be absent: importing this
module then still works, `unavailable` says why, and a call raises RuntimeError. Every op raises RuntimeError naming the
op, the argument, what was expected and what came. No gradient flows through these functions: they are the steps of an
autograd node.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .engines import cpu
from .reference import Pair, opmath

__all__ = ["load_cuda", "projection_dgrad", "projection_fwd", "projection_wgrad", "unavailable"]

_TILE_ROWS = 128  # rows of one tile of statistics
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OLDEST_CAPABILITY = (7, 5)


def _cuda_libraries() -> list[Path]:
    return sorted(Path(__file__).resolve().parent.glob("_cuda*.so"))


@functools.cache
def load_cuda() -> str | None:
    """Load the CUDA library if it is not loaded yet; None, or the reason why it cannot be used, in words.

    A GPU is not asked for: `unavailable` looks at that.
    """
    if _CPU_REASON is not None:
        return f"the schemas are in the CPU library: {_CPU_REASON}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    libraries = _cuda_libraries()
    if not libraries:
        package = Path(__file__).resolve().parent
        note = package / "_cuda_refusal.txt"
        said = note.read_text(encoding="utf-8").strip() if note.exists() else f"no _cuda*.so in {package}"
        return f"the CUDA library is not built: {said}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"the CUDA library {libraries[0]} cannot be used with torch {torch.__version__}: {error}"
    return None


def _built_for() -> tuple[int, int] | None:
    """The oldest compute capability that the CUDA library has code for; None where it does not say."""
    library = ctypes.CDLL(str(_cuda_libraries()[0]))
    ask = getattr(library, "resnet_fused_oldest_arch", None)
    return None if ask is None else divmod(ask(), 10)


@functools.cache
def _capability_reason(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = torch.cuda.get_device_capability(index)
    has = f"this GPU has {'.'.join(map(str, capability))}"
    if capability < _OLDEST_CAPABILITY:
        return f"the kernels need compute capability {'.'.join(map(str, _OLDEST_CAPABILITY))}, and {has}"
    built_for = _built_for()
    if built_for is None:
        return "the CUDA library is older than this package: build it again"
    if capability < built_for:
        asked = '"7.5;8.0;9.0;10.0;12.0+PTX"'
        oldest = ".".join(map(str, built_for))
        return (
            f"the CUDA library is built for {oldest} and newer, and {has}: build it with TORCH_CUDA_ARCH_LIST={asked}"
        )
    return None


# What torch.compiler.assume_constant_result does, which imports all of the compiler: see `_CPU_REASON`.
_capability_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the ops cannot run on tensors of this device and dtype, in words."""
    if device.type == "cpu":
        return _CPU_REASON if dtype in _CPU_DTYPES else f"no CPU kernels for {dtype}"
    if device.type != "cuda":
        return f"no kernels for {device.type} tensors"
    if dtype not in _CPU_DTYPES[:3]:
        return f"no CUDA kernels for {dtype}"
    return _CUDA_REASON or _capability_reason(device.index)


def _missing(*_args: object) -> Any:
    raise RuntimeError(f"resnet_fused.projection: {cpu.load()}")


# Each op's overload, bound once below: a call then costs no look-up in torch.ops.
_projection_fwd: Callable[..., Any] = _missing
_projection_dgrad: Callable[..., Any] = _missing
_projection_wgrad: Callable[..., Any] = _missing


def _convolutions_allow_tf32() -> bool:
    """CuDNN's setting for convolutions; tracing knows its older name only, which must then not contradict it."""
    if torch.compiler.is_compiling():
        return torch.backends.cudnn.allow_tf32
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _allows_tf32(t: Tensor) -> bool:
    return t.is_cuda and t.dtype == torch.float32 and _convolutions_allow_tf32()


def projection_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    stats: bool,
    moments: Tensor | None,
    add: Tensor | None,
    add_moments: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """``(out, partials)``: the projection in training, the whole end of the block in inference; one kernel.

    Args:
        x: ``(N, C, H, W)`` channels_last.  weight: ``(K, C, 1, 1)``, dtype of ``x``.  bias: ``(K,)``, any float dtype.
        stats: make ``partials`` ``(T, 3, K)``: count, mean and M2 of every 128 rows of what is stored, else
            ``(0, 3, K)``. Not with ``moments``, ``add`` or ``relu``.
        moments: ``(5, K)``, the projection's own affine, or None.
        add, add_moments: the main branch ``(N, K, P, Q)`` channels_last and its affine ``(5, K)``, or None.

    Returns:
        ``out`` ``(N, K, P, Q)`` channels_last, dtype of ``x``; nothing is rounded on the way to it.

    Raises:
        RuntimeError: an argument is wrong, or there is no library for its device.

    Equivalent to: ``F.relu(F.batch_norm(F.conv2d(x, weight, bias, stride), ...) + F.batch_norm(add, ...))``
    """
    return _projection_fwd(x, weight, bias, stride, stats, moments, add, add_moments, relu, _allows_tf32(x))


def projection_dgrad(
    g: Tensor,
    y: Tensor | None,
    weight: Tensor,
    moments: Tensor | None,
    sums: Tensor | None,
    size: Pair,
    stride: Pair,
    add: Tensor | None,
) -> Tensor:
    """``dx`` ``(N, C, H, W)`` channels_last: batch norm's backward, the product and the gradient sum; one kernel.

    Args:
        g: ``(N, K, P, Q)`` channels_last: gradient of the batch norm's output, of ``y`` itself without ``moments``.
        y: the stored output, like ``g``; read with ``sums`` only.
        weight: ``(K, C, 1, 1)``, dtype of ``g``.
        moments, sums: ``(5, K)`` and ``(2, K)``; without ``sums`` the statistics are running ones.
        size: ``(H, W)``.
        add: the main branch's gradient of ``x``, ``(N, C, H, W)`` channels_last, or None.

    Raises:
        RuntimeError: an argument is wrong, or there is no library for its device.

    Equivalent to: ``torch.nn.grad.conv2d_input((N, C, *size), weight, dy, stride) + add``
    """
    return _projection_dgrad(g, y, weight, moments, sums, size, stride, add, _allows_tf32(g))


def projection_wgrad(
    g: Tensor,
    y: Tensor | None,
    x: Tensor,
    moments: Tensor | None,
    sums: Tensor | None,
    stride: Pair,
    dtype: torch.dtype,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """``(dweight, dbias)``; rows are split, and the parts added in a fixed order.

    Args:
        g, y, moments, sums: as in `projection_dgrad`.  x: ``(N, C, H, W)`` channels_last, dtype of ``g``.
        dtype: of ``dweight`` ``(K, C, 1, 1)``: that of ``x``, or float32 for a master weight.
        bias: whether ``dbias`` ``(K,)``, in at least float32, is made; else it is ``(0,)``.

    Raises:
        RuntimeError: an argument is wrong, or there is no library for its device.

    Equivalent to: ``torch.nn.grad.conv2d_weight(x, (K, C, 1, 1), dy, stride)`` and ``dy.sum((0, 2, 3))``
    """
    return _projection_wgrad(g, y, x, moments, sums, stride, dtype, bias, _allows_tf32(x))


def _channels_last(like: Tensor, n: Any, c: Any, h: Any, w: Any) -> Tensor:
    return like.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _register_fakes() -> None:
    """Shapes, dtypes and strides of the outputs, so that torch.compile can trace the ops; bind the overloads."""

    def fwd(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, stats: bool, *_: object
    ) -> tuple[Tensor, Tensor]:
        n, k = x.shape[0], weight.shape[0]
        p, q = ((size - 1) // step + 1 for size, step in zip(x.shape[2:], stride, strict=True))
        tiles = torch.sym_max(1, (n * p * q + _TILE_ROWS - 1) // _TILE_ROWS) if stats else 0
        return _channels_last(x, n, k, p, q), x.new_empty((tiles, 3, k), dtype=opmath(x.dtype))

    def dgrad(g: Tensor, y: Tensor | None, weight: Tensor, m: object, s: object, size: Pair, *_: object) -> Tensor:
        return _channels_last(g, g.shape[0], weight.shape[1], *size)

    def wgrad(
        g: Tensor,
        y: object,
        x: Tensor,
        m: object,
        s: object,
        stride: object,
        dtype: torch.dtype,
        bias: bool,
        *_: object,
    ) -> tuple[Tensor, Tensor]:
        dweight = g.new_empty((g.shape[1], x.shape[1], 1, 1), dtype=dtype)
        return dweight, g.new_empty(g.shape[1] if bias else 0, dtype=opmath(g.dtype))

    for name, fake in (("projection_fwd", fwd), ("projection_dgrad", dgrad), ("projection_wgrad", wgrad)):
        torch.library.register_fake(f"resnet_fused::{name}", fake)
        globals()[f"_{name}"] = getattr(torch.ops.resnet_fused, name).default


def _cpu_reason() -> str | None:
    reason = cpu.load()
    if reason is None and not hasattr(torch.ops.resnet_fused, "projection_fwd"):
        return "the CPU library is older than this package: build it again"
    return reason


# Constants: `unavailable` is traced by torch.compile.
_CPU_REASON = _cpu_reason()
_CUDA_REASON = load_cuda()
if _CPU_REASON is None:
    _register_fakes()
