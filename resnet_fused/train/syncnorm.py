"""Synchronised batch norm in a training run: torch's own, which on the CPU is given arithmetic that it lacks.

``nn.SyncBatchNorm`` refuses CPU tensors while it trains. Fused blocks run it there all the same; a batch norm outside
of any block, and those of the stock twin, are called as modules: they take `SynchronisedBatchNorm`.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def synchronise(model: nn.Module, device: str) -> nn.Module:
    """``model`` with every batch norm synchronised over all ranks, in place; on the CPU too.

    The modules are exactly ``nn.SyncBatchNorm``, so fused blocks know them; only calling one is changed, and only for
    a ``device`` that torch refuses.

    Args:
        model: fused or not.
        device: where it will train.
    """
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if torch.device(device).type == "cpu":
        for module in model.modules():
            if type(module) is nn.SyncBatchNorm:
                module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
    return model


def _forward(module: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """``nn.SyncBatchNorm.forward``, on the CPU."""
    if not module.training or not dist.is_initialized():
        return type(module).forward(module, x)
    out, mean, variance, count = SynchronisedBatchNorm.apply(x, module.weight, module.bias, module.eps)
    steps, running_mean, running_var = module.num_batches_tracked, module.running_mean, module.running_var
    if module.track_running_stats and steps is not None and running_mean is not None and running_var is not None:
        steps.add_(1)
        momentum = 1.0 / steps.item() if module.momentum is None else module.momentum
        unbiased = variance * (count / (count - 1))
        running_mean.lerp_(mean.to(running_mean), momentum)
        running_var.lerp_(unbiased.to(running_var), momentum)
    return out


def _over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, in their order, so that it is the same on all of them and in every run."""
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    return torch.stack(everyone).sum(0)


def _per_channel(x: Tensor) -> Tensor:
    """Sums over all dimensions but the second, in float64."""
    return x.double().sum([d for d in range(x.dim()) if d != 1])


class SynchronisedBatchNorm(torch.autograd.Function):
    """Batch norm by the statistics of all ranks' rows; a rank may have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        """``(N, C, ...)`` in any floating dtype -> the same, and ``(C,)`` float64 mean and variance, and the count."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        rows = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64)
        summed = _over_ranks(torch.cat([_per_channel(x), rows]))
        mean, count = summed[:-1] / summed[-1], summed[-1]
        variance = _over_ranks(_per_channel((x.double() - mean.view(shape)).square())) / count
        rstd = (variance + eps).rsqrt()
        gamma = torch.ones_like(mean) if weight is None else weight.double()
        beta = torch.zeros_like(mean) if bias is None else bias.double()
        out = (x - mean.view(shape)) * (gamma * rstd).view(shape) + beta.view(shape)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.has_bias, ctx.shape = bias is not None, shape
        return out.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Of ``out`` alone; gradients of weight and bias are this rank's, as those of any other parameter."""
        dy = gradients[0].double()
        x, weight, mean, rstd, count = ctx.saved_tensors
        shape = ctx.shape
        xhat = (x - mean.view(shape)) * rstd.view(shape)
        dbias, dweight = _per_channel(dy), _per_channel(dy * xhat)
        share = _over_ranks(torch.cat([dbias, dweight])) / count
        gamma = rstd if weight is None else rstd * weight.double()
        first, second = share.chunk(2)
        dx = gamma.view(shape) * (dy - first.view(shape) - xhat * second.view(shape))
        return (
            dx.to(x.dtype),
            None if weight is None else dweight.to(weight.dtype),
            dbias.to(weight.dtype) if ctx.has_bias else None,
            None,
        )
