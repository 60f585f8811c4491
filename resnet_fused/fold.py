"""`fold` and `unfold`: a network for inference, its batch norms folded into its convolutions.

Nothing is taken from the model: its parameters, buffers, state dict and classes stay, and the folded filters are kept
beside them (`folded`), which costs the memory of the filters once more. So nothing can be lost, a state dict that is
loaded later counts, and a call that records gradients, a training step, an export or a trace runs as if nothing had
been folded.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, TypeVar

from torch import nn

from .folded import BY_FOLD, FOLDED, Folded
from .fuse import fuse, restore
from .links import child
from .modules import Fused
from .spec import ChainSpec
from .structure import BINDING, Binding, hooked, obstacle

Model = TypeVar("Model", bound=nn.Module)
_BatchNorm = nn.modules.batchnorm._BatchNorm


def fold(model: Model) -> Model:
    """Fold the batch norms of a model in eval mode into its convolutions, for inference; returns ``model`` itself.

    Blocks are fused first where `fuse` has not been called. From then on a call in eval mode that records no gradient
    (``torch.inference_mode()``, ``torch.no_grad()``, or nothing that wants one) runs one convolution per conv-BN, with
    the add and the ReLU after it; on a CPU they are oneDNN's, in float32 and bfloat16. Any other call runs as it did.
    On a GPU our kernels apply the batch norm in the convolution already, and nothing is gained.

    The folded filters are made at the first call, in float64, rounded to the dtype they are used in. They are made
    again after a state dict was loaded, an optimizer stepped, a tensor was changed in place, replaced or moved. What
    leaves no trace on a tensor, writing through ``.data`` or ``.detach().numpy()``, is seen only by a sample of 64
    elements of each tensor: call `fold` again after writing to single elements in this way.

    Args:
        model: in eval mode, with or without `fuse`.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: a batch norm is in training mode; a parameter is an inference tensor, whose changes cannot be seen;
            or nothing can be folded, with the reason. The model is then as it was.

    Warns:
        UserWarning: a block cannot be folded (a hook inside, no running statistics) and runs as it did.

    Equivalent to: ``model`` in eval mode, up to rounding.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold: model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_mode(model)
    before = {module: type(module) for module in model.modules()}
    if not any(isinstance(module, Fused) for module in before):
        fuse(model)
        for module, cls in before.items():
            if type(module) is not cls:
                module.__dict__[BY_FOLD] = True
    reasons: list[str] = []
    count = 0
    for name, module in model.named_modules():
        binding: Binding | None = module.__dict__.get(BINDING)
        if not isinstance(module, Fused) or binding is None or binding.spec is None:
            continue
        reason = _refusal(module, binding, binding.spec)
        if reason is None:
            module.__dict__[FOLDED] = Folded()
            count += 1
        else:
            module.__dict__.pop(FOLDED, None)
            reasons.append(f"{name or 'the model'}: {reason}")
    if not count:
        unfold(model)
        detail = "; ".join(reasons) or "no block is a chain of convolutions and batch norms (see explain)"
        raise ValueError(f"fold: model: expected a block whose batch norms can be folded, got none: {detail}")
    for reason in reasons:
        warnings.warn(f"resnet_fused: not folded: {reason}", UserWarning, stacklevel=2)
    return model


def unfold(model: Model) -> Model:
    """Undo `fold` exactly, and the fusing that it did itself; returns ``model``.

    Parameters and buffers were never changed.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfold: model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        module.__dict__.pop(FOLDED, None)
        if BY_FOLD in module.__dict__:
            restore(module)
    return model


def _check_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"fold: model: expected eval mode, got training mode in '{name}' ({type(module).__name__}); "
                "call model.eval() first"
            )
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"fold: model: expected tensors whose changes can be seen, got the inference tensor '{name}'; make or "
                "load the model outside torch.inference_mode()"
            )


def _refusal(block: Any, binding: Binding, spec: ChainSpec) -> str | None:
    """Why a fused block cannot be folded, or None."""
    reason = obstacle(block, binding)
    if reason is not None:
        return reason
    if hooked(block):
        return "hook on the block"
    for site in spec.site_specs():
        if site.bn is not None and child(block, site.bn).running_mean is None:
            return f"{site.bn} has no running statistics"
    return None
