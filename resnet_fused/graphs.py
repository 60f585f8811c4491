"""A model's training step as CUDA graphs, for GPUs that wait for the host: small batches, small images.

The graphs are PyTorch's own, `torch.cuda.make_graphed_callables`: one replay for the forward, one for the backward,
in place of some thousand launches. Here is what that call does not look after: the state that its warm-up moves, and
the calls that a graph would answer wrongly without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .structure import hooked, hooked_globally

_DEVICE = "cuda"


class GraphedModel(nn.Module):
    """What `graphed` returns. ``model``: the model itself, whose state dict is the one to save."""

    _replay: Any

    def __init__(self, model: nn.Module, sample: Tensor) -> None:
        super().__init__()
        self.model = model
        self._sample = _described(sample)
        self._modes = _modes(model)
        self.__dict__["_replay"] = _captured(model, sample)  # not a child: its parameters are the model's

    def forward(self, input: Tensor) -> Tensor:
        """The model's output: by the graphs in training, by the model itself in eval mode and without gradients.

        Raises:
            ValueError: an input unlike the sample in shape, dtype, device, memory format or ``requires_grad``.
            RuntimeError: a part of the model was put into another mode, or hooked, after the capture.
        """
        if not (self.training and self.model.training and torch.is_grad_enabled()):
            return self.model(input)
        got = _described(input)
        if got != self._sample:
            raise ValueError(f"graphed: input: expected {_worded(self._sample)} as the sample had, got {_worded(got)}")
        _refuse_hooks(self.model)
        modes = _modes(self.model)
        if modes != self._modes:
            changed = next(
                name for (name, _), now, then in zip(self.model.named_modules(), modes, self._modes) if now != then
            )
            raise RuntimeError(
                f"graphed: model: expected the modes it was captured in, but {changed or 'the model'} changed between "
                "train and eval; call graphed again"
            )
        return self._replay(input)


def graphed(model: nn.Module, sample: Tensor) -> GraphedModel:
    """A model whose training forward and backward are replayed as CUDA graphs; worth it where the host is the limit.

    The model itself is left as it is and shares every parameter and buffer with the result, so an optimizer made
    before stays valid and ``model`` goes on working without graphs. The warm-up that a capture needs moves nothing:
    running statistics, ``num_batches_tracked`` and every other buffer, gradients and the random number generators are
    afterwards what they were.

    Limits: every input must be like the sample, so a loader drops its last, smaller batch; the output lies in memory
    that the next call overwrites; a graph holds what it needs for backward for good, and addresses of parameters and
    buffers, so ``.to()``, `load_state_dict(..., assign=True)` or a replaced parameter need a new call of `graphed`, as
    do another momentum or eps and another autocast setting; gradients arrive all at once after the
    backward's replay, so DDP overlaps nothing with it, and DDP wraps the result, not the model; under autocast, make
    the call inside ``torch.autocast(..., cache_enabled=False)``; there is no second derivative.

    Args:
        model: in training mode, on one GPU, without hooks in it.
        sample: ``(N, C, H, W)``, float, on that GPU: shape, dtype, memory format and ``requires_grad`` of all inputs.

    Raises:
        RuntimeError: torch sees no GPU; a module of the model, or all modules, have hooks.
        ValueError: the sample is not such a tensor; the model is in eval mode, lies elsewhere, has nothing to train,
            or is graphed already.

    Equivalent to: ``model``
    """
    _check_model(model)
    if not torch.cuda.is_available():
        raise RuntimeError("graphed: expected a GPU for CUDA graphs, but torch sees none")
    _check_sample(sample)
    _refuse_hooks(model)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.device != sample.device:
            raise ValueError(f"graphed: model: expected every tensor on {sample.device}, got {name} on {t.device}")
    if not sample.requires_grad and not any(p.requires_grad for p in model.parameters()):
        raise ValueError("graphed: model: expected a parameter or a sample that requires a gradient, got none")
    return GraphedModel(model, sample)


class _Captured(nn.Module):
    """A shell for `torch.cuda.make_graphed_callables`, which replaces the forward of the module it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


def _captured(model: nn.Module, sample: Tensor) -> Any:
    static = torch.empty_like(sample).copy_(sample.detach()).requires_grad_(sample.requires_grad)
    with _kept(model, sample.device):
        return torch.cuda.make_graphed_callables(_Captured(model), (static,))


@contextlib.contextmanager
def _kept(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put every buffer and the random number generators back to what they are now, in place."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def _described(t: Tensor) -> tuple[Any, ...]:
    last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    return tuple(t.shape), t.dtype, t.device, "channels_last" if last else "contiguous", t.requires_grad


def _worded(described: tuple[Any, ...]) -> str:
    shape, dtype, device, layout, requires_grad = described
    return f"{shape} {dtype} on {device}, {layout}, requires_grad={requires_grad}"


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"graphed: model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, GraphedModel):
        raise ValueError("graphed: model: expected a model without graphs, got one that is graphed already")
    if not model.training:
        raise ValueError("graphed: model: expected training mode, got eval mode; call model.train() first")


def _check_sample(sample: object) -> None:
    if not isinstance(sample, Tensor):
        raise ValueError(f"graphed: sample: expected a tensor, got {type(sample).__name__}")
    if sample.device.type != _DEVICE:
        raise ValueError(f"graphed: sample: expected a tensor on a GPU, got one on {sample.device}")
    if sample.dim() != 4 or sample.numel() == 0 or not sample.is_floating_point():
        raise ValueError(
            f"graphed: sample: expected a non-empty float tensor (N, C, H, W), got {tuple(sample.shape)} {sample.dtype}"
        )


def _refuse_hooks(model: nn.Module) -> None:
    """Hooks run while a graph is captured and never again."""
    if hooked_globally():
        raise RuntimeError("graphed: expected no hooks, got a global module hook")
    for name, module in model.named_modules():
        if hooked(module):
            raise RuntimeError(f"graphed: model: expected no hooks, got one on {name or 'the model itself'}")
