"""The projection over a launcher of its CUDA kernels, with the signatures of `resnet_fused.reference_projection`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.emulation import device

Pair = tuple[int, int]
# (operation, fields, tensors, positions of the outputs): runs the kernels, fills the outputs.
Launch = Callable[[str, Sequence[int], Sequence["Tensor | None"], Sequence[int]], None]
BLOCK_ROWS = 128
PLAIN, SCALED, BATCH_STATISTICS = range(3)


def _rows(t: Tensor | None) -> Tensor | None:
    """(N, H, W, C), contiguous."""
    return None if t is None else t.permute(0, 2, 3, 1).contiguous()


def _images(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1).contiguous()


def tiles(rows: int) -> int:
    """Tiles of statistics."""
    return max(1, -(-rows // BLOCK_ROWS))


@dataclasses.dataclass(frozen=True)
class Emulated:
    """``columns`` and ``splits`` are the plan's choices, made here by the test."""

    launch: Launch
    columns: int = 64
    splits: int = 1

    def _fields(
        self, x_shape: Sequence[int], y_shape: Sequence[int], stride: Pair, size: int, prologue: int, *rest: int
    ) -> list[int]:
        n, c, h, w = x_shape
        return [n, c, h, w, *y_shape[1:], *stride, self.columns, size, prologue, *rest]

    def projection_fwd(
        self,
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
        n, _, h, w = x.shape
        p, q, k = -(-h // stride[0]), -(-w // stride[1]), weight.shape[0]
        out = x.new_empty((n, p, q, k))
        partials = torch.empty((tiles(n * p * q) if stats else 0, 3, k))
        bias = None if bias is None else bias.float()
        tensors = [_rows(x), _flat(weight), bias, out, partials if stats else None, moments, _rows(add), add_moments]
        fields = self._fields(x.shape, (n, k, p, q), stride, x.element_size(), PLAIN, 1, relu, 0)
        self.launch("fwd", fields, tensors, (3, 4))
        return _images(out), partials

    def _gradient(self, moments: Tensor | None, sums: Tensor | None, y: Tensor | None) -> tuple[int, Tensor | None]:
        if moments is None:
            return PLAIN, None
        return (SCALED, None) if sums is None else (BATCH_STATISTICS, _rows(y))

    def projection_dgrad(
        self,
        g: Tensor,
        y: Tensor | None,
        weight: Tensor,
        moments: Tensor | None,
        sums: Tensor | None,
        size: Pair,
        stride: Pair,
        add: Tensor | None,
    ) -> Tensor:
        dx = g.new_empty((g.shape[0], *size, weight.shape[1]))
        prologue, y = self._gradient(moments, sums, y)
        tensors = [_rows(g), y, _flat(weight), moments, sums, dx, _rows(add)]
        x_shape = (g.shape[0], weight.shape[1], *size)
        fields = self._fields(x_shape, g.shape, stride, g.element_size(), prologue, 1, 0, 0)
        self.launch("dgrad", fields, tensors, (5,))
        return _images(dx)

    def projection_wgrad(
        self,
        g: Tensor,
        y: Tensor | None,
        x: Tensor,
        moments: Tensor | None,
        sums: Tensor | None,
        stride: Pair,
        dtype: torch.dtype,
        bias: bool,
    ) -> tuple[Tensor, Tensor]:
        k, c = g.shape[1], x.shape[1]
        prologue, y = self._gradient(moments, sums, y)
        dw, dbias = torch.empty((k, c), dtype=dtype), torch.empty(k if bias else 0)
        partials = bias_partials = None
        if self.splits > 1:
            partials = torch.empty((self.splits, k, c))
            bias_partials = torch.empty((self.splits, k))
        wanted = dbias if bias else None
        tensors = [_rows(g), y, _rows(x), moments, sums, partials, bias_partials, dw, wanted]
        wide = dtype == torch.float32
        fields = self._fields(x.shape, g.shape, stride, g.element_size(), prologue, self.splits, 0, wide)
        self.launch("wgrad", fields, tensors, (5, 6, 7, 8))
        return dw[:, :, None, None], dbias


def on_device(
    math: str, variant: str = "plain", edits: tuple[device.Edit, ...] = (), beyond: int = 0, seed: int = 0
) -> Launch:
    """A launcher on the emulated device; activations and weights lie ``beyond`` bytes off an aligned address."""
    program = device.build(math, variant, edits)

    def launch(operation: str, fields: Sequence[int], tensors: Sequence[Tensor | None], outputs: Sequence[int]) -> None:
        # Tables of floats are always whole floats.
        offsets = [0 if t is None or beyond == 0 else max(beyond, t.element_size()) for t in tensors]
        device.run(program, operation, fields, tensors, outputs, offsets, seed)

    return launch
