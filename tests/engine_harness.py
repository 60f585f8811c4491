"""Shared by the tests of the Triton engine: the engine on a device that is no GPU, or on a GPU as it is."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import eager_blocks as eager
from resnet_fused import engines, fuse, plan
from resnet_fused.compiling import offline
from resnet_fused.engines import triton_primitives
from resnet_fused.kernels import target
from resnet_fused.kernels.launch import LaunchRecord, recording

from .emulation.launch import on_ptx
from .harness import randomise

needs_compiler = pytest.mark.skipif(bool(offline.missing_tools()), reason=offline.missing_tools())
CHANNELS, SIZE = 8, (5, 4)  # one width everywhere: the fewer kernels to compile


@pytest.fixture(autouse=True)
def fresh_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact float32, and no shape or primitive given up by an earlier test."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(plan, "_refused", {})
    monkeypatch.setattr(triton_primitives, "broken", {})


@contextlib.contextmanager
def running(variant: str | None = "own", arch: str = "sm_90", device: str = "cpu") -> Iterator[list[LaunchRecord]]:
    """Let the Triton engine run in the block, with ``variant`` forced; yields the launches.

    On the CPU each launch executes its compiled PTX for ``arch``, with tiles for ``arch``.
    """
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(engines.emulated())
            stack.enter_context(target.pretend(arch))
            stack.enter_context(on_ptx(arch))
        stack.enter_context(plan.force(variant))
        yield stack.enter_context(recording())


def convolutions(launches: list[LaunchRecord]) -> set[str]:
    """Which of our convolution kernels were launched."""
    return {launch.kernel for launch in launches if launch.kernel.startswith("_conv_")}


OURS = {"_conv_fwd_kernel", "_conv_dgrad_kernel", "_conv_wgrad_kernel"}


def projection(c: int, k: int, stride: int = 1, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=bias), nn.BatchNorm2d(k))


def bottleneck(**options: object) -> nn.Module:
    torch.manual_seed(0)
    shortcut = projection(CHANNELS, CHANNELS)
    return randomise(eager.Bottleneck(CHANNELS, CHANNELS, 1, shortcut, out_channels=CHANNELS, **options))  # type: ignore[arg-type]


def basic(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(eager.BasicBlock(CHANNELS, CHANNELS, **options))  # type: ignore[arg-type]


def images(batch: int = 2, seed: int = 0, size: tuple[int, int] = SIZE, channels: int = CHANNELS) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def fused(model: nn.Module, **options: str) -> nn.Module:
    return fuse(copy.deepcopy(model), engine="triton", **options)
