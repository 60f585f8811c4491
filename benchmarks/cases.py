"""Steps that the benchmarks race: a stock module beside its fused copy, and the proof that comes before."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from resnet_fused import fuse
from resnet_fused.benching.baselines import BASELINES
from resnet_fused.benching.contest import GradientStep
from resnet_fused.checking import check

OURS = "fused"


def contestants(stock: nn.Module, x: Tensor, baselines: tuple[str, ...]) -> dict[str, GradientStep]:
    """Forward and backward of a fused copy of ``stock``, and of the baselines by their labels.

    Args:
        stock: a plain float32 module in training mode; copied.
        x: the input ``(N, C, H, W)``, contiguous. Where it requires a gradient, so do its copies.
    """
    with torch.no_grad():
        dout = torch.randn_like(copy.deepcopy(stock)(x))

    def placed(t: Tensor, layout: torch.memory_format) -> Tensor:
        copied = t.detach().clone(memory_format=layout if t.dim() == 4 else torch.contiguous_format)
        return copied.requires_grad_(t.requires_grad)

    def step(model: nn.Module, layout: torch.memory_format) -> GradientStep:
        return GradientStep(model, placed(x, layout), placed(dout, layout))

    last = torch.channels_last
    made = {OURS: step(fuse(copy.deepcopy(stock).to(memory_format=last)), last)}
    for baseline in (BASELINES[name] for name in baselines):
        layout = baseline.memory_format
        made[baseline.label] = step(baseline.build(copy.deepcopy(stock).to(memory_format=layout)), layout)
    return made


def prove(stock: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse to time what is not right: the numerics law on this module and shape, before any timing.

    Raises:
        AssertionError: a tensor breaks the law; the table says which.
    """
    report = check(stock, shape=shape, dtype="fp32")
    if not report.passed:
        raise AssertionError(f"not timed, because not correct:\n{report}")
