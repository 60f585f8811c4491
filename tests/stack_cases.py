"""Shared by the tests of what a training script does beside calling the model: small nets, stock and fused."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import eager_blocks as eager
from resnet_fused import fuse
from tests.harness import randomise

Results = dict[str, Tensor]


class Sum(nn.Module):
    """A block whose add is out of place: it promotes."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + x)


def projection(c: int, k: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


def stage() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = eager.BasicBlock(8, 8), eager.Bottleneck(8, 4, downsample=projection(8, 16))
    return randomise(nn.Sequential(*blocks))  # type: ignore[return-value]


def pair(dtype: torch.dtype = torch.float64) -> dict[str, nn.Sequential]:
    stock = stage().to(dtype)
    return {"stock": stock, "fused": fuse(copy.deepcopy(stock))}


def images(seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 8, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state(model: nn.Module) -> Results:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def gradients(model: nn.Module) -> Results:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: Any, ref: Any) -> None:
    """Equal up to rounding, in names, shapes and dtypes."""
    if isinstance(ref, dict):
        assert got.keys() == ref.keys()
        for name in ref:
            torch.testing.assert_close(got[name], ref[name], msg=lambda m, name=name: f"{name}: {m}")
    else:
        torch.testing.assert_close(got, ref)


def identical(got: Results, ref: Results) -> None:
    assert got.keys() == ref.keys()
    assert [name for name in ref if not got[name].equal(ref[name])] == []


class NoHostSync(TorchDispatchMode):
    """Fails where the host looks at a value, or a shape depends on one: what a CUDA graph cannot capture."""

    FORBIDDEN = frozenset(
        ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero", "allclose")
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{func} looks at a value"
        self.seen.append(name)
        return func(*args, **kwargs or {})
