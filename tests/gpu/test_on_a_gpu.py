"""What only a GPU can show: no wait for the device, graph capture, repeatability, and every dtype of the kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import eager_blocks as eager
from resnet_fused import fuse, plan

from ..engine_harness import projection
from ..harness import hold_to_law, randomise, step

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)
pytestmark = pytest.mark.cuda
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(autouse=True)
def our_kernels() -> Iterator[None]:
    with plan.force(plan.OWN):
        yield


def _stage() -> nn.Module:
    torch.manual_seed(0)
    stage = nn.Sequential(eager.Bottleneck(64, 32, 2, projection(64, 128, 2)), eager.Bottleneck(128, 32))
    return randomise(stage).to(memory_format=torch.channels_last)


def _images(dtype: torch.dtype) -> Tensor:
    x = torch.randn(8, 64, 29, 27, generator=torch.Generator().manual_seed(0))
    return x.to("cuda", dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("tf32", [True, False], ids=["tf32", "exact"])
@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stage(dtype: str, memory: str, tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    hold_to_law(_stage(), _images(DTYPES[dtype]).cpu().float(), DTYPES[dtype], memory=memory, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_bitwise_repeatable(dtype: str) -> None:
    model = fuse(_stage().to("cuda", DTYPES[dtype]))
    first, second = (step(copy.deepcopy(model), _images(DTYPES[dtype])) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model(x)
    return [out, *torch.autograd.grad(out, list(model.parameters()), torch.ones_like(out))]


def test_a_step_never_waits_for_the_device() -> None:
    model, x = fuse(_stage().to("cuda", torch.bfloat16)), _images(torch.bfloat16)
    _gradients(model, x)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_captured_in_a_graph() -> None:
    model, x = fuse(_stage().to("cuda", torch.bfloat16)), _images(torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        _gradients(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph, state = torch.cuda.CUDAGraph(), copy.deepcopy(model.state_dict())
    with torch.cuda.graph(graph):
        captured = _gradients(model, x)
    model.load_state_dict(state)
    want = _gradients(copy.deepcopy(model), x)
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, want, strict=True):
        assert torch.equal(got, expected)
