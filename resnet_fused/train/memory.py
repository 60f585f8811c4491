"""What a forward keeps for its backward, counted."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


class Kept:
    """Bytes that autograd keeps of what runs inside `hooks`: unique storages, each counted once and whole.

    What is kept must live until the block ends: a freed storage's address could come again.

    Args:
        given: tensors that exist anyway, and are not counted.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self._kept: dict[int, int] = {}

    def hooks(self) -> AbstractContextManager[object]:
        """The block to count in: a forward."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def total(self) -> int:
        """Bytes."""
        return sum(self._kept.values())


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
    kept = Kept([*model.parameters(), *model.buffers(), x])
    with kept.hooks(), autocast or nullcontext():
        out = model(x)
    total = kept.total()
    del out
    return total
