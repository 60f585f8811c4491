"""The sites of a training step as problems to measure: what each is called with, noted from one real step.

A problem is what the plan decides about at once: an engine and a `plan.ConvShape`. It may be called in several ways
(from a plain, a pending or a joined source), which are measured together. Inputs are made anew from the noted shapes,
strides and dtypes, with values that no candidate may round to the other side of a ReLU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import plan, projected, site, winners
from ..calls import SiteCall, SiteGrads, SiteOutputs, SiteParams, Source
from ..nodes import site_gradients

VECTORS = ("conv_bias", "gamma", "beta")


class TensorSpec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Backward(NamedTuple):
    """What `site.site_backward` was called with, tensors as `TensorSpec`."""

    source: Source
    y: TensorSpec
    moments: TensorSpec
    g: TensorSpec
    sums: TensorSpec
    dskip: TensorSpec | None
    needs: tuple[bool, bool]
    masked: bool


class Use(NamedTuple):
    """One way in which a site is called: forward, and backward where there was one."""

    call: SiteCall
    source: Source
    params: SiteParams
    backward: Backward | None = None


@dataclasses.dataclass(frozen=True)
class SiteProblem:
    """Sites of one shape on one engine.

    Args:
        uses: the different calls.  count: calls per step.  extension: whether the projection ops can run it.
    """

    engine: str
    shape: plan.ConvShape
    uses: tuple[Use, ...]
    count: int
    extension: bool

    @property
    def key(self) -> str:
        """What `winners` knows it by."""
        return plan.problem_key(self.shape, self.engine)

    @property
    def cost(self) -> int:
        """Multiplications of the forward passes of one step: what is measured first."""
        s = self.shape
        pixels = (s.h // s.stride[0] or 1) * (s.w // s.stride[1] or 1)
        return self.count * s.n * pixels * s.k * s.c // s.groups * s.filter[0] * s.filter[1]

    def __str__(self) -> str:
        s = self.shape
        stride = f"/{s.stride[0]}" if s.stride != (1, 1) else ""
        rest = f", {s.groups} groups" if s.groups > 1 else ""
        kind = ", shortcut" if s.projection else ""
        size = f"{s.n}x{s.c}x{s.h}x{s.w} to {s.k}"
        return f"{size}, {s.filter[0]}x{s.filter[1]}{stride}{rest}{kind}, {str(s.dtype).removeprefix('torch.')}"


def _spec(value: Any) -> Any:
    """``value`` with every tensor in it, also in a tuple, replaced by its `TensorSpec`."""
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_spec, value))
    return value


class _Notes:
    """The watcher of a step: forward calls in their order, and the backward of each kind of call."""

    def __init__(self) -> None:
        self.uses: dict[Any, Use] = {}
        self.counts: dict[Any, int] = {}
        self.problems: dict[Any, tuple[plan.ConvShape, bool]] = {}

    def __call__(self, name: str, call: SiteCall, source: Source, *rest: Any) -> None:
        weight = rest[0].weight if name == "forward" else rest[1]
        call = call._replace(stride=_pair(call.stride), padding=_pair(call.padding), dilation=_pair(call.dilation))
        key = (call, source.kind, _spec(source.y), source.relu, _spec(weight))
        if name == "forward":
            takes = projected.takes(call.engine, source.y, weight, call.padding, call.groups)
            extension = call.projection and source.kind == "plain" and takes
            self.problems[key] = (plan.shape_of_call(call, source.y, weight), extension)
            self.uses.setdefault(key, Use(call, _spec(source), _spec(rest[0])))
            self.counts[key] = self.counts.get(key, 0) + 1
        elif key in self.uses:
            _, _, y, moments, g, sums, dskip, needs, mask = rest
            tensors = (_spec(source), _spec(y), _spec(moments), _spec(g), _spec(sums), _spec(dskip))
            back = Backward(*tensors, needs=tuple(needs), masked=mask is not None)
            self.uses[key] = self.uses[key]._replace(backward=back)


def _pair(sides: Any) -> tuple[int, int]:
    return int(sides[0]), int(sides[1])


def collect(step: Callable[[], object]) -> list[SiteProblem]:
    """Run ``step`` once and return its problems, the most expensive first."""
    notes = _Notes()
    with site.watched(notes):
        step()
    found: dict[tuple[str, plan.ConvShape], SiteProblem] = {}
    for key, use in notes.uses.items():
        shape, extension = notes.problems[key]
        name, count = (use.call.engine, shape), notes.counts[key]
        before = found.get(name, SiteProblem(*name, (), 0, extension))
        found[name] = dataclasses.replace(before, uses=(*before.uses, use), count=before.count + count)
    return sorted(found.values(), key=lambda problem: -problem.cost)


class Inputs(NamedTuple):
    """The arguments of a use; ``x`` and ``mask`` are what its forward keeps for the backward."""

    call: SiteCall
    source: Source
    params: SiteParams
    x: Tensor | None = None
    mask: Tensor | None = None
    y: Tensor | None = None
    moments: Tensor | None = None
    g: Tensor | None = None
    sums: Tensor | None = None
    dskip: Tensor | None = None
    needs: tuple[bool, bool] = (False, False)

    def forward(self) -> SiteOutputs:
        """`site.site_forward`."""
        return site.site_forward(self.call, self.source, self.params)

    def backward(self, needs: tuple[bool, bool] | None = None) -> SiteGrads:
        """`nodes.site_gradients`, for the gradients that the step needs or for ``needs``; none without a backward.

        Those of bias and affine come with the weight's, whether the engine makes them or they follow from the sums.
        """
        call, source, params, x, mask, y, moments, g, sums, dskip, own = self
        if y is None or moments is None or g is None or sums is None:
            return SiteGrads()
        needs = own if needs is None else needs
        wanted = (needs[1],) * 4
        grads, (_, bias, gamma, beta, *_) = site_gradients(
            call, source, x, params[:4], y, moments, g, sums, dskip, needs[0], wanted, mask
        )
        return grads._replace(**dict.fromkeys(VECTORS) if not needs[1] else dict(zip(VECTORS, (bias, gamma, beta))))


def make_inputs(use: Use, key: str, device: torch.device) -> Inputs:
    """Random tensors as ``use`` of the problem ``key`` has them; the generator is our own."""
    generator = torch.Generator(device).manual_seed(0)

    def fill(spec: TensorSpec | None, scale: float = 1.0) -> Any:
        if spec is None:
            return None
        # A view that steps over pixels is traced back to its whole tensor, whose storage must be there.
        reach = sum((size - 1) * step for size, step in zip(spec.shape, spec.stride)) + 1
        storage = torch.zeros(max(reach, 1) + sum(spec.stride), dtype=spec.dtype, device=device)
        made = storage.as_strided(spec.shape, spec.stride)
        return made.normal_(0, scale, generator=generator) if made.is_floating_point() else made

    rows = use.source.y.shape[0] * use.source.y.shape[2] * use.source.y.shape[3]
    source = _filled_source(use.source, fill, rows, device)
    fan_in = max(1, use.params.weight.shape[1] * use.params.weight.shape[2] * use.params.weight.shape[3])
    params = SiteParams(fill(use.params.weight, fan_in**-0.5), *map(fill, use.params[1:]))  # type: ignore[arg-type]
    if params.running_var is not None:
        params.running_var.fill_(1)
    inputs = Inputs(use.call, source, params)
    if use.backward is None:
        return inputs
    back = use.backward
    with winners.using({key: winners.Winner(plan.LIBRARY, "")}):
        kept = inputs.forward()
    outputs = back.y.shape[0] * back.y.shape[2] * back.y.shape[3]
    return inputs._replace(
        x={"plain": source.y, "join": kept.x}.get(source.kind),
        mask=kept.mask if back.masked else None,
        y=fill(back.y),
        moments=unit_moments(back.moments, outputs, device),
        g=fill(back.g),
        sums=fill(back.sums, outputs**0.5),
        dskip=fill(back.dskip),
        needs=back.needs,
    )


def unit_moments(spec: TensorSpec, rows: int, device: torch.device) -> Tensor:
    """Moments under which ``z`` is ``y`` itself in every precision, so that every candidate has the same ReLU mask."""
    moments = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    moments[1:3] = 1
    moments[4] = 1 / max(rows, 1)
    return moments


def _filled_source(spec: Source, fill: Callable[..., Any], rows: int, device: torch.device) -> Source:
    def moments(of: Any) -> Tensor | None:
        return None if of is None else unit_moments(of, rows, device)

    return spec._replace(
        y=fill(spec.y),
        moments=moments(spec.moments),
        residual=fill(spec.residual),
        residual_moments=moments(spec.residual_moments),
    )
