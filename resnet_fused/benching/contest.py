"""What is timed: a training step, a forward and backward, or an inference of a network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .race import Mark

# Small: labels are random, and a few steps must not end in values that no two programs agree on.
LEARNING_RATE = 0.01
MOMENTUM = 0.9
Batch = tuple[Tensor, Tensor]


class Contestant:
    """A network with what one step of it needs.

    Args:
        model: on its device, in its memory format.
        amp: the dtype of autocast, or None.
    """

    def __init__(self, model: nn.Module, amp: torch.dtype | None = None) -> None:
        self.model = model
        self.losses: list[Tensor] = []
        self.watch: AbstractContextManager[object] = nullcontext()
        self._device = next(model.parameters()).device.type
        self._amp = amp

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self._amp is None else torch.autocast(self._device, self._amp)

    def __call__(self, mark: Mark) -> None:
        """One step; phases end at ``mark``."""
        raise NotImplementedError

    def run(self) -> None:
        """One step, untimed."""
        self(lambda phase: None)

    def given(self) -> list[Tensor]:
        """Tensors that exist before a step and after it."""
        return [*self.model.parameters(), *self.model.buffers()]

    def release(self) -> None:
        """Drop the gradients of the step before."""
        self.model.zero_grad(set_to_none=True)


class TrainingStep(Contestant):
    """Forward with cross-entropy, backward, and SGD with momentum; float16 by autocast with a loss scale.

    Args:
        model, amp: as in `Contestant`.
        batches: images ``(N, C, H, W)`` and labels ``(N,)``, taken in turns, in the model's memory format.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], amp: torch.dtype | None = None) -> None:
        super().__init__(model.train(), amp)
        self._batches = batches
        self._optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
        self._scaler = torch.amp.GradScaler(self._device, enabled=amp is torch.float16)

    def __call__(self, mark: Mark) -> None:
        """One step; phases are forward, backward and optimizer."""
        images, labels = self._batches[len(self.losses) % len(self._batches)]
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast(), self.watch:
            loss = F.cross_entropy(self.model(images), labels)
        mark("forward")
        self._scaler.scale(loss).backward()
        mark("backward")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        mark("optimizer")
        self.losses.append(loss.detach())

    def given(self) -> list[Tensor]:
        """Parameters, buffers and batches."""
        return [*super().given(), *(tensor for batch in self._batches for tensor in batch)]


class GradientStep(Contestant):
    """Forward, and backward from a given gradient of the output to every parameter and, where asked, to the input.

    Args:
        model: in training mode.  x: ``(N, C, H, W)``.  dout: of the output's shape, dtype and memory format.
    """

    def __init__(self, model: nn.Module, x: Tensor, dout: Tensor) -> None:
        super().__init__(model.train())
        self.x, self._dout = x, dout

    def __call__(self, mark: Mark) -> None:
        """One step; phases are forward and backward."""
        self.release()
        with self.watch:
            out = self.model(self.x)
        mark("forward")
        out.backward(self._dout)
        mark("backward")

    def given(self) -> list[Tensor]:
        """Parameters, buffers, the input and the gradient of the output."""
        return [*super().given(), self.x, self._dout]

    def release(self) -> None:
        """Drop the gradients of the step before, the input's too."""
        super().release()
        self.x.grad = None


class Inference(Contestant):
    """Forward in eval mode, under ``torch.inference_mode``.

    Args:
        model, amp: as in `Contestant`.  images: ``(N, C, H, W)`` in the model's memory format.
    """

    def __init__(self, model: nn.Module, images: Tensor, amp: torch.dtype | None = None) -> None:
        super().__init__(model.eval(), amp)
        self._images = images

    def __call__(self, mark: Mark) -> None:
        """One forward, which is its only phase."""
        with torch.inference_mode(), self._autocast():
            self.model(self._images)
        mark("forward")
