"""Batch statistics of several processes: the two collectives of a site whose batch norm is a ``SyncBatchNorm``.

Each rank runs the site as if it were alone, with scratch buffers for running statistics and a momentum of 1: they then
hold this rank's mean and variance, whichever kernel reduced them. What differs from a site that is alone:

    forward   one all-gather of (count, mean, M2) per channel, merged in the order of ranks by Chan's formula
    backward  one all-reduce of (sum g, sum g * xhat), for the coefficients of dy alone

The moments hold 1 / count of all ranks, so no kernel has to know. The gradients of the batch norm's weight and bias are
this rank's own sums, as ``DistributedDataParallel`` expects. Ranks may have unequal batches, or none. Nothing here
depends on the device: unlike stock ``SyncBatchNorm`` it runs on CPU tensors over gloo, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import engines
from .calls import Group, SiteCall, SiteGrads, SiteOutputs, SiteParams, Source
from .engines import library
from .reference import opmath

if torch.distributed.is_available():
    # registers what torch.compile must know of the collectives
    import torch.distributed._functional_collectives

_ops = torch.ops._c10d_functional


def group_of(bn: nn.SyncBatchNorm) -> Group | None:
    """The processes over which a batch norm takes its statistics now; None: this process alone.

    As stock: without an initialised process group, in a group of one rank and in eval mode a ``SyncBatchNorm`` is a
    ``BatchNorm2d``.
    """
    if not bn.training or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    group: Any = bn.process_group or torch.distributed.group.WORLD
    return Group(group.group_name, group.size()) if group.size() > 1 else None


def describe(norms: Iterable[nn.Module]) -> str | None:
    """In words, over how many processes those of ``norms`` that synchronise do so in training; None: there are none."""
    if not any(isinstance(bn, nn.SyncBatchNorm) for bn in norms):
        return None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return "SyncBatchNorm as BatchNorm2d: no process group"
    groups: list[Any] = [
        bn.process_group or torch.distributed.group.WORLD for bn in norms if hasattr(bn, "process_group")
    ]
    sizes = sorted({group.size() for group in groups})
    return f"SyncBatchNorm over {' or '.join(map(str, sizes))} process{'es' if sizes != [1] else ''}"


def alone(model: nn.Module) -> Any:
    """A copy of a model whose ``SyncBatchNorm`` modules are ``BatchNorm2d``, and that holds no process group."""
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    twin = copy.deepcopy(model, {id(bn.process_group): bn.process_group for bn in norms if bn.process_group})
    for module in twin.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
            del module.process_group
    return twin


def _gathered(packed: Tensor, group: Group) -> Tensor:
    """``packed`` of every rank, in their order, along a new first dimension."""
    out = _ops.all_gather_into_tensor(packed, group.ranks, group.name)
    return _ops.wait_tensor(out).view(group.ranks, *packed.shape)


def _reduced(sums: Tensor, group: Group) -> Tensor:
    """The sum of ``sums`` over all ranks, the same bits on each."""
    return _ops.wait_tensor(_ops.all_reduce(sums, "sum", group.name))


def _rows(call: SiteCall, x: Tensor, weight: Tensor) -> Any:
    """The number of values per channel of the convolution's output on this rank."""
    rows = x.shape[0]
    sides = zip(x.shape[2:], call.padding, call.dilation, weight.shape[2:], call.stride, strict=True)
    for size, padding, dilation, taps, stride in sides:
        rows = rows * ((size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1)
    return rows


def _local(
    forward: Callable[[SiteCall, Source, SiteParams], SiteOutputs], call: SiteCall, source: Source, params: SiteParams
) -> tuple[SiteOutputs, Tensor]:
    """The site on this rank's rows, whose moments are of no use, and their ``(count, mean, M2)``: ``(3, K)``.

    A batch norm that is alone refuses a single row, and has no use for an empty batch: such a rank's convolution runs
    as in eval mode.
    """
    weight = params.weight
    k, wide = weight.shape[0], opmath(source.y.dtype)
    rows = _rows(call, source.y, weight)
    alone = call._replace(group=None, momentum=1.0, training=rows > 1)
    mean, var = (torch.zeros(k, dtype=wide, device=weight.device) for _ in range(2))
    made = forward(alone, source, SiteParams(weight, None, None, None, mean, var, None))
    if rows > 1:
        m2 = var * (rows - 1)  # a running variance is the unbiased one
    else:
        mean, m2 = made.y.sum((0, 2, 3), dtype=wide), var
    return made, torch.stack([torch.full_like(mean, rows), mean, m2])


def site_forward(
    forward: Callable[[SiteCall, Source, SiteParams], SiteOutputs], call: SiteCall, source: Source, params: SiteParams
) -> SiteOutputs:
    """A site whose statistics are those of all ranks of ``call.group``; ``forward`` runs it for this rank alone.

    Raises:
        ValueError: one value per channel on all ranks together, as ``F.batch_norm`` of the joined batch does; on the
            CPU and outside of torch.compile, where looking costs no synchronisation.
    """
    assert call.group is not None
    made, packed = _local(forward, call, source, params)
    partials = _gathered(packed, call.group)
    if not torch.compiler.is_compiling() and partials.device.type == "cpu" and partials[:, 0, 0].sum() == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {made.y.shape} and one value in all "
            f"on the {partials.shape[0]} ranks"
        )
    return made._replace(moments=library.batch_moments(engines.get(call.engine), call, params, partials))


def site_backward(
    backward: Callable[..., SiteGrads], call: SiteCall, sums: Tensor, before: tuple[Any, ...], after: tuple[Any, ...]
) -> SiteGrads:
    """Backward of `site_forward`, whose vectors are left to be made of this rank's own ``sums``.

    Args:
        backward: `resnet_fused.site.site_backward`.  before, after: its arguments between ``call`` and ``sums``, and
            after ``sums``.
    """
    assert call.group is not None
    grads = backward(call._replace(group=None), *before, _reduced(sums, call.group), *after)
    return grads._replace(conv_bias=None, gamma=None, beta=None)
