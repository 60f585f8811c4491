"""Running statistics that go back when a training step did not happen.

Under mixed precision a batch whose activations overflow leaves Inf or NaN in running means and variances. The gradient
scaler then skips the optimizer's step, but nothing takes the statistics back, and every later evaluation is NaN. This
keeps a copy of them per step and puts it back, on the device, where the scaler found an Inf.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

Group = tuple[torch.device, torch.dtype]


class protected_statistics:  # noqa: N801  # a context manager is named like a function, as torch.no_grad is
    """Take a model's running statistics back when the gradient scaler skips the step. Opt-in; stock PyTorch does not.

    One ``with`` block per optimizer step, around all of its forwards::

        with resnet_fused.protected_statistics(model) as guard:
            with torch.autocast("cuda", torch.float16):
                loss = criterion(model(x), target)
            scaler.scale(loss).backward()
            guard.step(scaler, optimizer)  # in the place of scaler.step(optimizer)
            scaler.update()

    Where somebody else's loop steps (Lightning, Accelerate), give the optimizers: ``protected_statistics(model,
    optimizer)`` watches whether each of them steps in the block, and `step` is not needed.

    ``running_mean``, ``running_var`` and ``num_batches_tracked`` of every batch norm that tracks them, fused or stock,
    are copied at the start of the block. At its end they are put back where a `step` in it met an Inf or NaN gradient,
    where a given optimizer did not step, and after an exception. No value is looked at from the host for it: the choice
    is made on the device, by what the scaler counted there, in a number of operations that does not grow with the
    model. Kept meanwhile: a copy of the statistics, 8 bytes per channel in float32. Batch norms in eval mode are as
    ever.

    Args:
        model: any module; its buffers must stay the same objects in the block (no ``.to()``, ``load_state_dict(...,
            assign=True)``).
        optimizers: whose steps are watched; all of them are expected to step once in a block.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or an optimizer is none of torch's.
        RuntimeError: a block is entered inside itself, or `step` or `roll_back` is called outside of it.
    """

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"protected_statistics: model: expected a torch.nn.Module, got {type(model).__name__}")
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                got = type(optimizer).__name__
                raise TypeError(f"protected_statistics: optimizers: expected torch.optim.Optimizer, got {got}")
        self._model = model
        # a wrapper such as Accelerate's steps the optimizer inside, whose hooks are called
        self._optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        self._hooks: list[Any] = []
        self._stepped: set[int] = set()
        self._groups: dict[Group, list[Tensor]] | None = None
        self._kept: dict[Group, Tensor] = {}
        self._found: list[Tensor] = []

    def __enter__(self) -> protected_statistics:
        if self._groups is not None:
            raise RuntimeError("protected_statistics: expected a block that is not entered yet, got one that is")
        self._groups = _grouped(_statistics(self._model))
        self._kept = {group: _flat(buffers) for group, buffers in self._groups.items()}
        self._found, self._stepped = [], set()
        self._hooks = [optimizer.register_step_post_hook(self._note) for optimizer in self._optimizers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None or any(id(optimizer) not in self._stepped for optimizer in self._optimizers):
            self.roll_back()
        elif self._found:
            self._choose()
        self._groups, self._kept, self._found = None, {}, []

    def step(self, scaler: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``scaler.step(optimizer)``, taking note of what the scaler found; returns what it returns.

        Call it once per optimizer, before ``scaler.update()``. One of them with an Inf is enough to go back.
        """
        self._entered("step")
        result = scaler.step(optimizer, *args, **kwargs)
        if scaler.is_enabled():
            # kept by the scaler from unscaling to its update, as tensors on the gradients' devices
            state = scaler._per_optimizer_states[id(optimizer)]
            self._found += state["found_inf_per_device"].values()
        return result

    def roll_back(self) -> None:
        """Put the statistics back now, for who knows without a scaler that the step was skipped.

        A framework that steps by itself says so: ``accelerator.optimizer_step_was_skipped`` for one.
        """
        with torch.no_grad():
            for group, buffers in self._entered("roll_back").items():
                torch._foreach_copy_(buffers, _split(self._kept[group], buffers))

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A watched optimizer has stepped, or, if it takes what the scaler found as a tensor, may have skipped it."""
        self._stepped.add(id(optimizer))
        found = getattr(optimizer, "found_inf", None)
        if isinstance(found, Tensor):
            self._found.append(found)

    def _entered(self, method: str) -> dict[Group, list[Tensor]]:
        if self._groups is None:
            raise RuntimeError(
                f"protected_statistics: {method}: expected a call inside the with block, got one outside"
            )
        return self._groups

    def _choose(self) -> None:
        """Every statistic as it was where anything was found, else as it is: selected, so that no NaN comes along."""
        with torch.no_grad():
            for group, buffers in self._entered("step").items():
                found = torch.stack([t.detach().reshape(()).to(group[0], non_blocking=True) for t in self._found]).sum()
                chosen = torch.where(found > 0, self._kept[group], _flat(buffers))
                torch._foreach_copy_(buffers, _split(chosen, buffers))


def _statistics(model: nn.Module) -> Iterable[Tensor]:
    """Each once, though modules may be shared."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            found |= {
                id(b): b for b in (module.running_mean, module.running_var, module.num_batches_tracked) if b is not None
            }
    return found.values()


def _grouped(buffers: Iterable[Tensor]) -> dict[Group, list[Tensor]]:
    groups: dict[Group, list[Tensor]] = {}
    for buffer in buffers:
        groups.setdefault((buffer.device, buffer.dtype), []).append(buffer)
    return groups


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in buffers])


def _split(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]
