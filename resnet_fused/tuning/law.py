"""Correctness before speed: a candidate's tensors under the numerics law, against the reference engine in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calls import SiteParams
from ..numerics import judge_all
from ..reference import opmath
from .sites import Inputs

Tensors = dict[str, Tensor]


def results(inputs: Inputs, part: str | None = None) -> Tensors:
    """Every tensor that one forward and one backward make, by name; the running buffers of ``inputs`` stay.

    ``part``: fwd, dgrad or wgrad alone; None: all three.
    """
    own = inputs._replace(params=SiteParams(*(None if t is None else t.clone() for t in inputs.params)))  # type: ignore[arg-type]
    found: dict[str, Tensor | None] = {}
    if part in (None, "fwd"):
        made = own.forward()
        found = {"y": made.y, "moments": made.moments, "x": made.x if own.source.kind == "join" else None}
    needs = (own.needs[0] and part in (None, "dgrad"), own.needs[1] and part in (None, "wgrad"))
    grads = own.backward(needs)
    alone = own.source.kind != "plain" and own.source.skip.kind == "none"
    if alone and own.source.relu and grads.source is not None:
        # It may be the gradient of the activation: whoever reads it masks it.
        grads = grads._replace(source=torch.where(own.source.y <= 0, 0, grads.source))
    found.update({f"grad of {name}": t for name, t in grads._asdict().items()})
    return {name: t for name, t in found.items() if t is not None}


def _moved(inputs: Inputs, dtype: torch.dtype | None, layout: torch.memory_format) -> Inputs:
    """``inputs`` for the reference engine: activations in ``dtype`` (None: as they are) and ``layout``.

    The weight is rounded to the activations' dtype first, as the forward does with a float32 master weight.
    """
    own = inputs.source.y.dtype

    def move(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        if dtype is not None:
            t = t.to(dtype) if t.dim() == 4 else t.to(opmath(dtype))
        return t.contiguous(memory_format=layout) if t.dim() == 4 else t

    weight = inputs.params.weight if dtype is None else inputs.params.weight.to(own)
    params = SiteParams(*map(move, inputs.params._replace(weight=weight)))
    source = inputs.source._replace(**{name: move(t) for name, t in inputs.source._asdict().items()})
    moved = inputs._replace(**{name: move(t) for name, t in inputs._asdict().items()})
    x = source.y if source.kind == "plain" else moved.x
    return moved._replace(call=inputs.call._replace(engine="reference"), source=source, params=params, x=x, mask=None)


class Law:
    """The measure for one use, made once for all candidates: float64, and plain PyTorch in both memory formats.

    Args:
        tf32: whether the convolution of float32 may run in TF32.  part: as in `results`.
    """

    def __init__(self, inputs: Inputs, tf32: bool = False, part: str | None = None) -> None:
        # TF32 has the mantissa of float16: where a product is allowed it, how operands lose theirs is not prescribed.
        self.dtype = torch.float16 if tf32 else inputs.source.y.dtype
        last = torch.channels_last
        self.ref = {n: t.double() for n, t in results(_moved(inputs, torch.float64, last), part).items()}
        self.eager = [results(_moved(inputs, None, layout), part) for layout in (last, torch.contiguous_format)]

    def broken_by(self, got: Tensors) -> str | None:
        """The first tensor that breaks the law, in words; None when all keep it."""
        verdicts = judge_all(got, self.ref, self.eager, self.dtype)
        return next((str(verdict) for verdict in verdicts if not verdict.passed), None)
