"""nvcc's PTX of the projection's kernels, launched on the PTX emulator as the launchers of csrc/cuda do."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from torch import Tensor

from tests.emulation import nvcc, ptx
from tests.emulation.projection import BLOCK_ROWS, Launch

_THREADS = 256
_CLASSES = {"bf16": "MathBF16", "f16": "MathF16", "tf32": "MathTF32", "f32": "MathF32"}
_POINTER, _INT, _BOOL = ctypes.c_void_p, ctypes.c_int, ctypes.c_bool


class Geometry(ctypes.Structure):
    """``Geometry`` of csrc/cuda/args.h."""

    _fields_ = [("rows", ctypes.c_int64), *((name, _INT) for name in ("C", "K", "H", "W", "P", "Q", "sh", "sw"))]


def _structure(name: str, pointers: str, others: Sequence[tuple[str, type]]) -> type[ctypes.Structure]:
    fields = [("shape", Geometry), *((pointer, _POINTER) for pointer in pointers.split()), *others]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


FwdArgs = _structure(
    "FwdArgs",
    "x weight bias out partials moments add add_moments",
    [("relu", _BOOL), ("x_aligned", _BOOL), ("weight_aligned", _BOOL), ("out_aligned", _BOOL)],
)
DgradArgs = _structure(
    "DgradArgs",
    "g y weight moments sums dx add",
    [("prologue", _INT), ("g_aligned", _BOOL), ("weight_aligned", _BOOL), ("dx_aligned", _BOOL)],
)
WgradArgs = _structure(
    "WgradArgs",
    "g y x moments sums partials dbias_partials dw dbias",
    [
        ("prologue", _INT),
        ("splits", _INT),
        ("dw_is_float", _BOOL),
        ("g_aligned", _BOOL),
        ("x_aligned", _BOOL),
        ("dw_aligned", _BOOL),
    ],
)


def _address(t: Tensor | None) -> int | None:
    return None if t is None or t.numel() == 0 else t.data_ptr()


def _whole(t: Tensor | None, extent: int) -> bool:
    return t is None or (t.data_ptr() | extent * t.element_size()) % 16 == 0


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def on_ptx(
    math: str, target: str, stats: list[ptx.Stats] | None = None, edit: Callable[[str], str] | None = None
) -> Launch:
    """A launcher on the emulator.

    Args:
        target: sm_80 or sm_90.  stats: gains one `ptx.Stats` for every kernel.  edit: changes the PTX first.
    """
    text = nvcc.compile_to(math, target, "ptx").read_text(encoding="utf-8")
    text = edit(text) if edit else text

    def start(operation: str, what: str, args: ctypes.Structure, blocks: int, shared: int, t: Sequence[object]) -> None:
        tensors = [tensor for tensor in t if isinstance(tensor, Tensor) and tensor.numel()]
        name = f"projection_{operation}_kernelI{what}"
        # The splits of wgrad have slices of their own number: one block at a time.
        together = _THREADS if operation == "wgrad" else 8192
        found = ptx.launch(text, [bytes(args)], (blocks,), _THREADS, shared, name, tensors, together)
        if stats is not None:
            stats.append(found)

    def launch(operation: str, fields: Sequence[int], t: Sequence[Tensor | None], outputs: Sequence[int]) -> None:
        n, c, h, w, k, p, q, sh, sw, columns, _, prologue, splits, relu, wide = fields
        rows = n * p * q
        shape = Geometry(rows, c, k, h, w, p, q, sh, sw)
        pointers = [_address(tensor) for tensor in t]
        what = f"NS0_{len(_CLASSES[math])}{_CLASSES[math]}ELi{columns}E"
        shared = nvcc.shared_bytes(math, target)[operation, columns]
        row_tiles = _tiles(rows, BLOCK_ROWS)
        if operation == "fwd":
            aligned = (_whole(t[0], c), _whole(t[1], c), _whole(t[3], k) and _whole(t[6], k))
            args = FwdArgs(shape, *pointers, relu, *aligned)
            start(operation, what, args, row_tiles * _tiles(k, columns), shared, t)
        elif operation == "dgrad":
            aligned = (_whole(t[0], k) and _whole(t[1], k), _whole(t[2], c), _whole(t[5], c) and _whole(t[6], c))
            args = DgradArgs(shape, *pointers, prologue, *aligned)
            start(operation, what, args, row_tiles * _tiles(c, columns), shared, t)
        else:
            aligned = (_whole(t[0], k) and _whole(t[1], k), _whole(t[2], c), _whole(t[7], c))
            args = WgradArgs(shape, *pointers, prologue, splits, wide, *aligned)
            start(operation, what, args, _tiles(k, BLOCK_ROWS) * _tiles(c, columns) * splits, shared, t)
            if splits > 1:
                kind = (
                    "fE" if wide or math in ("tf32", "f32") else f"NS0_{'8BFloat16' if math == 'bf16' else '7Float16'}E"
                )
                start("wgrad_reduce", kind, args, _tiles(k * c + k, _THREADS), 0, t)

    return launch
