"""A block of a chain bound to its modules: they are the user's own, and are read at every call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import projected, synchronise
from .calls import SiteCall, SiteParams
from .limits import recomputing
from .spec import ChainSpec, SiteSpec


class Link(NamedTuple):
    """A block in a run: its module, its spec, how much it keeps for backward, and the engine asked for."""

    block: nn.Module
    spec: ChainSpec
    memory: str = "speed"
    engine: str | None = None


def child(module: nn.Module, path: str) -> Any:
    """The submodule at ``path``, as `nn.Module.get_submodule` but without its checks and its type."""
    found = module._modules.get(path)
    if found is not None:
        return found
    for name in path.split("."):
        found = module._modules.get(name)
        module = getattr(module, name) if found is None else found
    return module


def conv_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The padding in pixels, whatever way it was given."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))  # type: ignore[return-value]
    return conv.padding  # type: ignore[return-value]


_FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


def is_frozen_norm(module: nn.Module | None) -> bool:
    """Whether a module is built as a frozen batch norm is: four vectors of one length as buffers, nothing to train.

    torchvision's ``FrozenBatchNorm2d`` is, and other projects' classes of that name are. The structure says nothing
    of the forward: a block with a class that is not torchvision's is proven by the probe before it is fused.
    """
    if module is None or isinstance(module, torch.jit.ScriptModule) or module._parameters or module._modules:
        return False
    buffers = module._buffers
    if set(buffers) - {"num_batches_tracked"} != _FROZEN_BUFFERS:
        return False
    shapes = {None if (t := buffers[name]) is None else t.shape for name in _FROZEN_BUFFERS}
    return len(shapes) == 1 and None not in shapes and len(next(iter(shapes))) == 1  # type: ignore[arg-type]


# ``nn.Module.__getattr__`` comes after a failed look-up in the object; tensors are looked up where they are instead.


def weight_and_bias(module: nn.Module) -> tuple[Any, Any]:
    """``(module.weight, module.bias)``."""
    own = module._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return module.weight, module.bias


def _buffer(module: nn.Module, name: str) -> Any:
    own = module._buffers
    return own[name] if name in own else getattr(module, name)


def takes_batch_statistics(bn: nn.Module) -> bool:
    """Whether a batch norm normalises by the batch at hand: in training, or where it tracks none."""
    return isinstance(bn, nn.modules.batchnorm._BatchNorm) and (bn.training or _buffer(bn, "running_mean") is None)


def bind(block: nn.Module, site: SiteSpec, engine: str, hand_stride: int = 1) -> tuple[SiteCall, SiteParams]:
    """A site's static call and its tensors, read from the block's own modules at this moment."""
    conv = child(block, site.conv)
    bn = child(block, site.bn or "")
    mean = _buffer(bn, "running_mean")
    padding = conv.padding if type(conv.padding) is tuple else conv_padding(conv)
    tracked = mean is not None
    batch_norm = isinstance(bn, nn.modules.batchnorm._BatchNorm)
    training = takes_batch_statistics(bn)
    # a recomputed batch was counted in the first forward; batch statistics themselves are the same again
    moving = not training or (bn.training and bn.track_running_stats and tracked and not recomputing())
    call = SiteCall(
        engine,
        conv.stride,
        padding,
        conv.dilation,
        conv.groups,
        site.relu,
        training,
        bn.momentum if batch_norm else 0.0,
        bn.eps if batch_norm else getattr(bn, "eps", 0.0),  # a frozen one without the attribute adds none
        hand_stride,
        False,
        synchronise.group_of(bn) if type(bn) is nn.SyncBatchNorm else None,
    )
    params = SiteParams(
        *weight_and_bias(conv),
        *weight_and_bias(bn),
        mean if moving else None,
        _buffer(bn, "running_var") if moving else None,
        _buffer(bn, "num_batches_tracked") if training and moving else None,
    )
    return call, params


def module_shortcut(link: Link, x: Tensor, size: torch.Size) -> Tensor:
    """What a shortcut that is a module of its own makes of the block's input, broadcast to ``size`` as an add would."""
    out = child(link.block, link.spec.shortcut.path)(x)
    return (out if out.shape == size else out.expand(size)).contiguous(memory_format=torch.channels_last)


def plain_projection(link: Link, site: SiteSpec, x: Tensor, engine: str) -> Tensor:
    """A projection without batch norm: an ordinary convolution, finished."""
    conv = child(link.block, site.conv)
    if projected.takes(engine, x, conv.weight, conv_padding(conv), conv.groups):
        return projected.PlainProjectionFunction.apply(conv.stride, x, conv.weight, conv.bias)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    weight = conv.weight.to(x.dtype)
    out = nn.functional.conv2d(x, weight, bias, conv.stride, conv_padding(conv), conv.dilation, conv.groups)
    return out.contiguous(memory_format=torch.channels_last)
