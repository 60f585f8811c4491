"""The projection shortcut on the CPU against ATen's convolution, at ResNet-50's four sites, in turns.

``convolution`` is the product alone. ``site`` is what a training step does around it: statistics in the forward,
batch norm's backward and the main branch's gradient in the backward; the others take the CPU engine's passes for
that. Each case first proves its result right under the numerics law. GFLOP/s of the JSON are those of the medians.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import OURS
from benchmarks.conftest import Turns
from resnet_fused import projection
from resnet_fused.benching.race import whole
from resnet_fused.engines import cpu
from resnet_fused.numerics import assert_law
from tests.projection_cases import CASES, Inputs, expected, make_inputs, rearranged

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# C, K, H = W, stride.
SITES = {"layer1": (64, 256, 56, 1), "layer2": (256, 512, 56, 2), "layer3": (512, 1024, 28, 2)}
SITES["layer4"] = (1024, 2048, 14, 2)
LAYOUTS = {"ATen NCHW": torch.contiguous_format, "ATen channels_last": torch.channels_last}
MASKS = {"dgrad": (True, False, False), "wgrad": (False, True, False)}


def convolution_backward(i: Inputs, dy: Tensor, mask: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        dy, i["x"], i["weight"], None, i["stride"], (0, 0), (1, 1), False, (0, 0), 1, mask
    )


def ours_alone(i: Inputs, operation: str) -> Callable[[], object]:
    x, weight, g, stride = i["x"], i["weight"], i["g"], i["stride"]
    calls: dict[str, Callable[[], object]] = {
        "fwd": lambda: projection.projection_fwd(x, weight, None, stride, False, None, None, None, False),
        "dgrad": lambda: projection.projection_dgrad(g, None, weight, None, None, tuple(x.shape[2:]), stride, None),
        "wgrad": lambda: projection.projection_wgrad(g, None, x, None, None, stride, x.dtype, False),
    }
    return calls[operation]


def theirs_alone(i: Inputs, operation: str) -> Callable[[], object]:
    if operation == "fwd":
        return lambda: torch.conv2d(i["x"], i["weight"], None, i["stride"])
    return lambda: convolution_backward(i, i["g"], MASKS[operation])


def ours_in_a_site(i: Inputs, operation: str) -> Callable[[], object]:
    x, weight, stride, table = i["x"], i["weight"], i["stride"], (i["moments"], i["sums"])
    size = tuple(x.shape[2:])
    calls: dict[str, Callable[[], object]] = {
        "fwd": lambda: projection.projection_fwd(x, weight, None, stride, True, None, None, None, False),
        "dgrad": lambda: projection.projection_dgrad(i["g"], i["y"], weight, *table, size, stride, i["dx_main"]),
        "wgrad": lambda: projection.projection_wgrad(i["g"], i["y"], x, *table, stride, x.dtype, False),
    }
    if operation == "backward":
        return lambda: (calls["dgrad"](), calls["wgrad"]())
    return calls[operation]


def theirs_in_a_site(i: Inputs, operation: str) -> Callable[[], object]:
    def fwd() -> object:
        return cpu.bn_stats(torch.conv2d(i["x"], i["weight"], None, i["stride"]))

    def backward() -> object:
        coef = cpu.bn_bwd_finalize(i["sums"], i["moments"], True)
        dy = cpu.bn_bwd_apply(i["g"], i["y"], i["moments"], coef, False)
        dx, dw, _ = convolution_backward(i, dy, (True, True, False))
        return dx.add_(i["dx_main"]), dw

    return fwd if operation == "fwd" else backward


def prove(c: int, k: int, dtype: torch.dtype) -> None:
    """The law at a small image of the site's channels."""
    for name in ("train", "dgrad-plain", "wgrad-plain", "dgrad-batch-add", "wgrad-batch"):
        inputs = make_inputs((1, c, 6, 5), k, (2, 2), dtype)
        ref, eager = expected(name, inputs)
        assert_law(CASES[name](projection, rearranged(inputs, torch.channels_last)), ref, eager, dtype)


@pytest.mark.parametrize(
    "site", [pytest.param(name, marks=[pytest.mark.quick] if name == "layer4" else []) for name in SITES]
)
@pytest.mark.parametrize(
    ("what", "operation"),
    [("convolution", "fwd"), ("convolution", "dgrad"), ("convolution", "wgrad"), ("site", "fwd"), ("site", "backward")],
)
def test_projection(
    benchmark: Any, request: pytest.FixtureRequest, turns: Turns, site: str, what: str, operation: str
) -> None:
    option = request.config.option
    c, k, h, stride = SITES[site]
    h = max(2, h * option.image // 224)
    prove(c, k, torch.float32)
    inputs = make_inputs((option.batch, c, h, h), k, (stride, stride), torch.float32)
    ours, theirs = (ours_alone, theirs_alone) if what == "convolution" else (ours_in_a_site, theirs_in_a_site)
    steps = {OURS: whole(ours(rearranged(inputs, torch.channels_last), operation))}
    steps |= {name: whole(theirs(rearranged(inputs, layout), operation)) for name, layout in LAYOUTS.items()}
    race = turns(f"projection {site} {what} {operation}, batch {option.batch}, {h} px", steps)
    flops = 2 * c * k * inputs["g"].numel() // k * (2 if operation == "backward" else 1)
    rates = {name: flops / race.figures(name)["milliseconds"]["step"]["median"] / 1e6 for name in race.finished()}
    benchmark.extra_info["GFLOP_per_s"] = rates
