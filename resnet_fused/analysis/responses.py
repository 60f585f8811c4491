"""What layer responses are made of: a site's spread, in closed form, and the table of all sites.

A site's response is its output after batch norm, before ReLU and add. Over a batch of M rows (N, P, Q) and K channels,
with biased batch variances v, batch norm gives channel c the mean ``beta_c`` and the variance ``gamma_c^2 v_c /
(v_c + eps)``, so by the law of total variance over channels

    std^2 = mean_c(gamma_c^2 v_c / (v_c + eps)) + mean_c(beta_c^2) - (mean_c beta_c)^2

and no output need exist. Over batches the law holds again, with M * K as weights: `Spread` merges count, mean and sum
of squares by Chan's formula. That is exact for the outputs as they were, each batch normalised by its own statistics
(which is not what one large batch would have given). All of it is float64; what is not exact is the rounding of the
moments, made in the chain's accumulation dtype. The outputs' own rounding to the activations' dtype never enters.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CLOSED, MEASURED = "closed form", "measured"


class Channels(NamedTuple):
    """One batch of one site: rows ``M``, and each channel's mean and biased variance, ``(K,)`` float64 on the CPU."""

    rows: float
    means: Tensor
    variances: Tensor


def channels_of_moments(moments: Tensor, eps: float) -> Channels:
    """A training site's channels after batch norm, from its moments ``(5, K)`` (`reference.bn_finalize`)."""
    _, rstd, scale, shift, inverse = moments.detach().to("cpu", torch.float64)
    # gamma^2 v / (v + eps), where rstd = (v + eps)^-1/2; a channel that is constant may round below zero.
    variances = (scale / rstd).square() * (1 - eps * rstd.square()).clamp(min=0)
    rows = 1 / float(inverse[0])
    # One row is refused in training, and of an empty batch the count is kept as 1.
    return Channels(0.0 if rows == 1 else rows, shift, variances)


def channels_of(tensor: Tensor) -> Channels:
    """A tensor's channels ``(N, K, ...)``, measured."""
    dims = [dim for dim in range(tensor.dim()) if dim != 1]
    wide = tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)
    rows = tensor.numel() // max(1, tensor.shape[1])
    if not rows:
        nothing = torch.zeros(tensor.shape[1], dtype=torch.float64)
        return Channels(0.0, nothing, nothing)
    variances, means = torch.var_mean(wide, dims, correction=0)
    return Channels(float(rows), means.to("cpu", torch.float64), variances.to("cpu", torch.float64))


class Spread:
    """Count, mean and sum of squared deviations of all values of a site, batch by batch."""

    def __init__(self) -> None:
        self.count = 0.0
        self._mean = 0.0
        self._squares = 0.0

    def add(self, batch: Channels) -> None:
        """Take in one batch; an empty one changes nothing."""
        count = batch.rows * len(batch.means)
        if not count:
            return
        mean = float(batch.means.mean())
        variance = float(batch.variances.mean() + batch.means.var(correction=0))
        total = self.count + count
        delta = mean - self._mean
        self._mean += delta * count / total
        self._squares += variance * count + delta * delta * self.count * count / total
        self.count = total

    @property
    def std(self) -> float:
        """The biased standard deviation; NaN where nothing came."""
        return math.sqrt(self._squares / self.count) if self.count else math.nan


@dataclasses.dataclass(frozen=True)
class LayerResponse:
    """One site.

    Args:
        name: of its convolution in the model (of its batch norm, where none stands right before that).
        norm: of its batch norm.  kernel: the convolution's, or None.
        std: of its output after batch norm.  how: ``"closed form"`` or ``"measured"``.
    """

    name: str
    norm: str
    kernel: tuple[int, ...] | None
    std: float
    how: str

    @property
    def kernel_text(self) -> str:
        """As ``3x3``."""
        return "x".join(map(str, self.kernel)) if self.kernel else "-"


@dataclasses.dataclass(frozen=True)
class LayerResponses:
    """The responses of a model's sites in network order: in that of registration, which is the forward's by custom.

    Args:
        layers: a row for each site.
        batches: how many are pooled.
        unseen: batch norms of the model that gave nothing: not run, or not part of what was watched.
    """

    layers: tuple[LayerResponse, ...]
    batches: int = 1
    unseen: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The sites' names."""
        return tuple(layer.name for layer in self.layers)

    @property
    def std(self) -> tuple[float, ...]:
        """The sites' standard deviations."""
        return tuple(layer.std for layer in self.layers)

    def sorted(self) -> LayerResponses:
        """The same from the largest to the smallest, the lower half of the paper's figure."""
        return dataclasses.replace(self, layers=tuple(sorted(self.layers, key=lambda layer: -layer.std)))

    def only(self, kernel: str | int | tuple[int, ...] | None) -> LayerResponses:
        """The sites whose convolution has this kernel: ``"3x3"``, 3 or (3, 3); None keeps all.

        Raises:
            ValueError: ``kernel`` is none of these.
        """
        if kernel is None:
            return self
        wanted = _kernel(kernel)
        return dataclasses.replace(self, layers=tuple(layer for layer in self.layers if layer.kernel == wanted))

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return dataclasses.asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as JSON, written to ``path`` where one is given."""
        return _written(json.dumps(self.to_dict(), indent=1), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """A header and a line for each site, written to ``path`` where one is given."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("name", "norm", "kernel", "std", "how"))
        writer.writerows((row.name, row.norm, row.kernel_text, repr(row.std), row.how) for row in self.layers)
        return _written(text.getvalue(), path)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerResponse]:
        return iter(self.layers)

    def __str__(self) -> str:
        columns = ("layer", "kernel", "std", "how")
        rows = [(row.name, row.kernel_text, f"{row.std:.6g}", row.how) for row in self.layers]
        widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(line, widths)).rstrip() for line in (columns, *rows)]
        lines.append(f"{len(rows)} layers over {self.batches} batch{'' if self.batches == 1 else 'es'}")
        if self.unseen:
            lines.append(f"not seen: {', '.join(self.unseen)}")
        return "\n".join(lines)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _kernel(kernel: object) -> tuple[int, ...]:
    sides: object = kernel
    if isinstance(kernel, str):
        parts = kernel.split("x")
        sides = tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else None
    elif isinstance(kernel, int):
        sides = (kernel, kernel)
    if not isinstance(sides, tuple) or len(sides) < 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"layer_responses: kernel: expected '3x3', 3, (3, 3) or None, got {kernel!r}")
    return sides
