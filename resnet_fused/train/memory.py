"""What a forward keeps for its backward, counted."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def kept_for_backward(model: nn.Module, x: Tensor, autocast: AbstractContextManager[object] | None = None) -> int:
    """Bytes that autograd keeps after ``model(x)``: unique storages, each counted once and whole.

    Parameters, buffers and the input are not counted: they exist anyway. ``model`` is not touched (a
    copy runs, in the mode that ``model`` is in).

    Args:
        model: any module.
        x: ``(N, C, H, W)``.
        autocast: the precision to run in; None is the model's own.
    """
    model = copy.deepcopy(model)
    given = [*model.parameters(), *model.buffers(), x]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast or nullcontext():
        # The graph must live until all is counted: a freed storage's address could come again.
        out = model(x)
    total = sum(kept.values())
    del out
    return total
