"""Shared by the equivalence tests: run a model one training step, and hold it to the numerics law."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet_fused import fuse
from resnet_fused.modules import Fused
from resnet_fused.numerics import assert_law, judge_all

Outcome = dict[str, Tensor]
# inputs per comparison, by whether the dtype is narrower than float32; see `hold_to_law`
SAMPLES = {False: (1, 8, 64), True: (8, 32, 128)}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms affines and running statistics that a mistake in any of them would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, mean, spread in (("weight", 1.0, 0.3), ("bias", 0.0, 0.3), ("running_mean", 0.0, 0.5)):
                value = getattr(module, name, None)
                if isinstance(module, nn.BatchNorm2d) and value is not None:
                    value.copy_(torch.randn(value.shape, generator=generator) * spread + mean)
            if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def _wide(t: Tensor) -> Tensor:
    return t.detach().to("cpu", t.dtype if t.is_floating_point() else torch.float64, copy=True)


def step(
    model: nn.Module, x: Tensor, dout: Tensor | None = None, autocast: torch.dtype | None = None, seed: int = 1
) -> Outcome:
    """One forward and backward: the output, the input's and every parameter's gradient, every buffer, on the CPU.

    A parameter without gradient is reported as absent: the name ``none.<parameter>`` stands for it. ``seed`` is of the
    output's gradient, where ``dout`` does not give it.
    """
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    amp = torch.autocast(x.device.type, autocast) if autocast is not None else contextlib.nullcontext()
    with amp:
        out = model(x)
    if dout is None:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out.backward(dout.to(out))
    result = {"output": out.detach().cpu()}
    if x.grad is not None:
        result["input.grad"] = x.grad.cpu()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            result[f"none.{name}"] = torch.zeros((), dtype=torch.float64)
        else:
            result[f"{name}.grad"] = _wide(parameter.grad)
    for name, buffer in model.named_buffers():
        result[name] = _wide(buffer)
    return result


def hold_to_law(
    model: nn.Module,
    x: Tensor,
    dtype: torch.dtype,
    *,
    layout: str = "channels_last",
    memory: str = "speed",
    engine: str | None = None,
    autocast: bool = False,
    device: str = "cpu",
    prepare: Callable[[nn.Module], object] | None = None,
    run: Callable[..., Outcome] = step,
) -> nn.Module:
    """Compare ``fuse(model)`` with ``model`` after one training step, or what ``run`` does; returns the fused model.

    A ReLU mask flips where ``z`` is within rounding of zero, and a max pool's choice where two values
    tie: in a small block these are a few rare, large events, and which of two correct programs has one on a
    given input is luck. So where the law fails on a few inputs it is applied to a larger sample of them,
    `SAMPLES`, all stacked into one; the law itself stays the same, and the largest sample decides.

    Args:
        model, x: in float32; both are rounded to ``dtype`` (under ``autocast`` only x and the run are).
        device: where all of it runs, the float64 reference too; outcomes are compared on the CPU.
    """
    stock_dtype = torch.float32 if autocast else dtype
    stock = copy.deepcopy(model).to(device, stock_dtype)
    if prepare is not None:
        prepare(stock)
    fused = fuse(copy.deepcopy(stock).to(memory_format=LAYOUTS[layout]), memory=memory, engine=engine)
    assert any(isinstance(m, Fused) for m in fused.modules()), "nothing was fused"
    amp = dtype if autocast else None
    draws: list[tuple[Outcome, ...]] = []
    for sample in SAMPLES[torch.finfo(dtype).bits < 32]:
        for i in range(len(draws), sample):
            drawn = x if i == 0 else torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
            draws.append(draw(stock, fused, drawn.to(device, stock_dtype), LAYOUTS[layout], amp, run))
        got, ref, *eager = (stack(outcomes) for outcomes in zip(*draws, strict=True))
        if all(verdict.passed for verdict in judge_all(got, ref, eager, dtype)):
            return fused
    assert_law(got, ref, eager, dtype)
    return fused


def draw(
    stock: nn.Module,
    fused: nn.Module,
    x: Tensor,
    layout: torch.memory_format,
    amp: torch.dtype | None,
    run: Callable[..., Outcome] = step,
) -> tuple[Outcome, ...]:
    """Ours, the float64 reference, and eager in both layouts, on one input."""
    ref = run(copy.deepcopy(stock).double(), x.double())
    eager = [
        run(copy.deepcopy(stock).to(memory_format=fmt), x.contiguous(memory_format=fmt), autocast=amp)
        for fmt in LAYOUTS.values()
    ]
    got = run(copy.deepcopy(fused), x.contiguous(memory_format=layout), autocast=amp)
    assert got["output"].dtype == eager[0]["output"].dtype
    return got, ref, *eager


def stack(outcomes: tuple[Outcome, ...]) -> Outcome:
    """Outcomes on several inputs as one, each tensor with a new first dimension."""
    assert all(outcome.keys() == outcomes[0].keys() for outcome in outcomes)
    return {name: torch.stack([outcome[name] for outcome in outcomes]) for name in outcomes[0]}
