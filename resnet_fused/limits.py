"""What the fused path leaves to the modules as they were written, and what it refuses in words.

`disable` switches it off. Transforms of ``torch.func`` and forward-mode AD go through the modules as written, which
torch knows how to transform; a second derivative of a fused node is refused when it is asked for. A forward that runs
inside a backward pass is a recomputation, as activation checkpointing makes them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

TWICE = (
    "resnet_fused: double backward is not supported by the fused path; use resnet_fused.disable() around the forward "
    "whose gradient is differentiated"
)
BATCHED = (
    "resnet_fused: a backward over a batch of gradients (is_grads_batched, vectorize=True) is not supported by the "
    "fused path; use resnet_fused.disable() around the forward"
)
_lock = threading.Lock()
_disabled = 0


@contextlib.contextmanager
def disable() -> Iterator[None]:
    """Run fused modules as they were written, in a ``with`` block or as a decorator: ``@disable()``.

    For what the fused path refuses, second derivatives above all, and for comparisons. Results are the same up to
    rounding. It holds for the whole process, because the backward pass recomputes checkpointed forwards in threads of
    its own; calls nest. `torch.compile` traces it, and compiles anew for a call inside it.

    Equivalent to: `unfuse` for the duration of the block
    """
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    global _disabled
    if torch.compiler.is_compiling():
        _disabled += change
        return
    with _lock:
        _disabled += change


def bypassed(x: object) -> bool:
    """Whether a call goes to the modules as written: export, tracing, `disable`, no tensor at all."""
    return not isinstance(x, Tensor) or isinstance(x, torch.fx.Proxy) or switched_off()


def switched_off() -> bool:
    """Whether everything goes to the modules as written at this moment."""
    return bool(_disabled) or torch.compiler.is_exporting() or torch.jit.is_tracing()


def transform() -> str | None:
    """The transform that torch is applying, which a fused node has no rule for, or None."""
    if isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter):  # torch.compile traces this form alone
        return "a torch.func transform is active"
    return "forward-mode differentiation is active" if forward_ad._current_level >= 0 else None


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, so that its batch has been counted before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class _RefuseTwice(torch.autograd.Function):
    """Passes gradients on; its backward is the error. ``depends``: what the gradients were made from."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError(TWICE)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A node's backward whose own derivative is an error in words, at no cost where nobody asks for it.

    The engine has grad mode on in a backward pass only for ``create_graph=True``. Every gradient then depends on what
    the node saved and on what came in, so it carries the error along those: `once_differentiable` would let it pass
    where the gradient that came in requires none, and `torch.autograd.grad` would find no way from it to the inputs.

    Raises:
        RuntimeError: the gradients that come in are batched by vmap.
    """
    traced = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return traced(ctx, *grads)
        first = grads[0]
        if first is not None and functorch.is_legacy_batchedtensor(first):
            raise RuntimeError(BATCHED)
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            made = backward(ctx, *grads)
        return _RefuseTwice.apply(
            len(made), *(g if g is None else g.detach() for g in made), *grads, *ctx.saved_tensors
        )

    return run
