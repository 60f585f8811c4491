"""`resnet_fused.functional` against the stock expressions, under the numerics law, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import functional
from resnet_fused.numerics import assert_law

from .harness import LAYOUTS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VECTORS = ("gamma", "beta", "running_mean", "running_var", "bias")
OPTIONS = {
    "plain": {},
    "strided, biased": {"stride": 2, "padding": (1, 2), "bias": True},
    "grouped, dilated": {"groups": 2, "dilation": 2, "padding": 2},
    "residual": {"padding": 1, "residual": True},
    "no relu": {"padding": 1, "relu": False},
    "residual, no relu": {"padding": 1, "residual": True, "relu": False},
    "momentum, eps": {"momentum": 0.3, "eps": 1e-2},
}


def _arguments(dtype: torch.dtype, options: dict) -> dict[str, Tensor]:
    n = 4 if dtype == torch.float32 else 64  # among many values a ReLU that rounding flips weighs little
    made = {"input": torch.randn(n, 8, 9, 7), "weight": torch.randn(12, 8 // options.get("groups", 1), 3, 3) / 8}
    made |= {name: torch.randn(12) for name in VECTORS if name != "bias" or options.get("bias")}
    made["running_var"] = torch.rand(12) + 0.5
    if options.get("residual"):
        made["residual"] = torch.randn(n, 12, 9, 7)
    wide = ("gamma", "beta", "running_mean", "running_var")
    return {name: t if name in wide else t.to(dtype) for name, t in made.items()}


def _stock(a: dict[str, Tensor], *, training: bool, relu: bool = True, momentum=0.1, eps=1e-5, **conv) -> Tensor:
    y = F.conv2d(a["input"], a["weight"], a.get("bias"), **conv)
    z = F.batch_norm(y, a["running_mean"], a["running_var"], a["gamma"], a["beta"], training, momentum, eps)
    z = z + a["residual"] if "residual" in a else z
    return F.relu(z) if relu else z


def _fused(a: dict[str, Tensor], **options) -> Tensor:
    return functional.conv_bn_relu(**a, **options)


def _outcome(run, arguments: dict[str, Tensor], **options) -> dict[str, Tensor]:
    leaves = {n: t.clone(memory_format=torch.preserve_format) for n, t in arguments.items()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(not name.startswith("running"))
    out = run(leaves, **options)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out))
    found = {"output": out.detach()} | {f"{n}.grad": t.grad for n, t in leaves.items() if t.grad is not None}
    return found | {n: t for n, t in leaves.items() if n.startswith("running")}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_conv_bn_relu(name: str, dtype: str, layout: str, training: bool) -> None:
    options = {k: v for k, v in OPTIONS[name].items() if k not in ("bias", "residual")}
    arguments = _arguments(DTYPES[dtype], OPTIONS[name])
    arguments["input"] = arguments["input"].contiguous(memory_format=LAYOUTS[layout])
    got = _outcome(_fused, arguments, training=training, **options)
    assert got["output"].is_contiguous(memory_format=LAYOUTS[layout])
    wide = {n: t.double() for n, t in arguments.items()}
    eager = []
    for fmt in LAYOUTS.values():
        laid = arguments | {"input": arguments["input"].contiguous(memory_format=fmt)}
        eager.append(_outcome(_stock, laid, training=training, **options))
    assert_law(got, _outcome(_stock, wide, training=training, **options), eager, DTYPES[dtype])


def test_without_affine_and_statistics() -> None:
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    ref = F.relu(F.batch_norm(F.conv2d(x.double(), w.double()), None, None, training=True))
    eager = F.relu(F.batch_norm(F.conv2d(x, w), None, None, training=True))
    assert_law({"out": functional.conv_bn_relu(x, w, training=True)}, {"out": ref}, [{"out": eager}], torch.float32)


def test_autocast_gives_its_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.conv_bn_relu(torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), training=True)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_add_relu(dtypes: tuple[str, str]) -> None:
    """One rounding only: bitwise what stock gives, NaN and infinities too."""
    a, b = (torch.randn(3, 5, 4, 6).to(getattr(torch, dtype)) for dtype in dtypes)
    a[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(a)
    a[1] = -b[1].to(a)  # exact zeros before the ReLU
    results = []
    for run in (functional.add_relu, lambda a, b: F.relu(a + b)):
        leaves = [t.clone().requires_grad_() for t in (a, b)]
        out = run(*leaves)
        out.backward(torch.ones_like(out))
        results.append([out, *(leaf.grad for leaf in leaves)])
    for got, ref in zip(*results):
        torch.testing.assert_close(got, ref, rtol=0, atol=0, equal_nan=True)


def test_gradcheck() -> None:
    x, w, r = torch.randn(2, 2, 4, 4), torch.randn(3, 2, 3, 3), torch.randn(2, 3, 2, 2)
    leaves = [t.double().requires_grad_() for t in (x, w, torch.rand(3) + 0.5, torch.randn(3), r)]

    def run(x: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, r: Tensor) -> Tensor:
        return functional.conv_bn_relu(x, w, gamma, beta, training=True, residual=r)

    assert torch.autograd.gradcheck(run, leaves)


BAD = {
    "input's type": ({"input": 3}, TypeError, "conv_bn_relu: input: expected a floating-point tensor, got int"),
    "input's dtype": ({"input": torch.ones(1, 3, 4, 4, dtype=torch.int64)}, TypeError, "got torch.int64"),
    "input's dimensions": ({"input": torch.ones(3, 4, 4)}, ValueError, "input: expected four dimensions"),
    "channels": ({"input": torch.ones(1, 4, 4, 4)}, ValueError, "input: expected 3 channels"),
    "gamma": ({"gamma": torch.ones(3)}, ValueError, r"gamma: expected shape \(4,\), got \(3,\)"),
    "one statistic": ({"running_mean": torch.ones(4)}, ValueError, "both or neither"),
    "no statistics": ({"training": False}, ValueError, "running statistics when training is False"),
    "residual": ({"residual": torch.ones(1)}, ValueError, "residual: expected shape"),
    "one value": ({"input": torch.ones(1, 3, 3, 3)}, ValueError, "Expected more than 1 value per channel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    changed, error, message = BAD[name]
    arguments = {"input": torch.ones(2, 3, 4, 4), "weight": torch.ones(4, 3, 3, 3), "training": True} | changed
    with pytest.raises(error, match=message):
        functional.conv_bn_relu(**arguments)


def test_add_relu_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match=r"add_relu: other: expected shape \(1, 2, 3, 3\), got \(1, 1, 3, 3\)"):
        functional.add_relu(torch.ones(1, 2, 3, 3), torch.ones(1, 1, 3, 3))
