"""Lanes: models that train side by side from one initialisation on the same batches."""

from __future__ import annotations

import copy
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fuse import fuse
from .batches import Batches
from .config import TrainConfig
from .errors import UserError
from .gradients import summed
from .models import build_model
from .ranks import ALONE, Ranks
from .recipes import Recipe
from .syncnorm import synchronise

FUSED, STOCK, YARDSTICK = "fused", "stock", "stock, other layout"
_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """Loss of a batch, the share of it that was classified wrongly, and the step's seconds."""

    loss: float
    error: float
    seconds: float


class Lane:
    """A model with its optimizer.

    Args:
        name: what reports call it.  model: already on its device.  ranks: those it is trained on together.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        recipe: Recipe,
        config: TrainConfig,
        channels_last: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.name = name
        self.model = model
        self.device = torch.device(config.device)
        self.amp = _AMP.get(config.amp)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.ranks = ranks
        self._shares_statistics = config.sync_bn
        self._trained: nn.Module | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """The precision that forwards run in."""
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

    def place(self, images: Tensor) -> Tensor:
        """``images`` on the lane's device, in its memory format."""
        return images.to(self.device, memory_format=self.memory_format)

    def _loss(self, logits: Tensor, labels: Tensor, count: int) -> Tensor:
        if self.ranks.size == 1:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") / count

    def step(self, images: Tensor, labels: Tensor, lr: float, count: int) -> StepResult:
        """One training step; the clock stops when the loss is known on the host, so it holds all the work.

        On several ranks ``images`` are this one's part, loss and error are the whole batch's. Gradients are summed over
        the ranks, so each rank's loss is its sum over the size of the whole batch, whatever its part.
        """
        if self._trained is None:  # not earlier: all ranks are here, and what they start from has been loaded
            several = self.ranks.size > 1
            self._trained = summed(self.model, self._shares_statistics) if several else self.model
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images, labels = self.place(images), labels.to(self.device)
        self._synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self._trained(images)
            loss = self._loss(logits, labels, count)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._synchronize()
        seconds = time.perf_counter() - start
        wrong = (logits.detach().argmax(1) != labels).float()
        if self.ranks.size == 1:
            return StepResult(loss.item(), wrong.mean().item(), seconds)
        total, error = self.ranks.total([loss.item(), wrong.sum().item() / count])
        return StepResult(total, error, seconds)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def evaluate(self, batches: Batches) -> tuple[float, float]:
        """Accuracy and mean loss on the test images, bit for bit whatever the number of ranks.

        Every batch is one rank's; all ranks learn all results (zeros are added to them) and add them in one order.
        """
        if not self._shares_statistics:
            self.ranks.copy_buffers(self.model)
        corrects, losses = [0.0] * batches.test_count, [0.0] * batches.test_count
        mine = range(self.ranks.rank, batches.test_count, self.ranks.size)
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            for number, (images, labels) in zip(mine, batches.test(), strict=True):
                logits, labels = self.model(self.place(images)).float(), labels.to(self.device)
                corrects[number] = (logits.argmax(1) == labels).sum().item()
                losses[number] = F.cross_entropy(logits, labels, reduction="sum").item()
        self.model.train()
        right = total = 0.0
        for correct, loss in zip(self.ranks.total(corrects), self.ranks.total(losses)):
            right += correct
            total += loss
        count = max(1, len(batches.dataset.test_labels))
        return right / count, total / count

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer and loss scale."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            UserError: it is another model's.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"train: --resume: the checkpoint does not fit its own settings: {reason}") from error


def build_lanes(config: TrainConfig, recipe: Recipe, classes: int, channels: int, ranks: Ranks = ALONE) -> list[Lane]:
    """The fused lane first; with ``compare`` its stock twin, with ``yardstick`` stock in the other layout.

    All start from bitwise the same parameters: one stock model is built under the seed, and copied.
    """
    if config.amp not in ("off", *_AMP):
        raise UserError(f"train: --amp: expected off, bf16 or fp16; got {config.amp!r}")
    torch.manual_seed(config.seed)
    stock = build_model(config.model, num_classes=classes, in_channels=channels)

    def placed(channels_last: bool) -> nn.Module:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return copy.deepcopy(stock).to(config.device).to(memory_format=layout)

    def lane(name: str, model: nn.Module, channels_last: bool = config.channels_last) -> Lane:
        if ranks.size > 1 and config.sync_bn:
            model = synchronise(model, config.device)
        return Lane(name, model.train(), recipe, config, channels_last, ranks)

    lanes = [lane(FUSED, fuse(placed(config.channels_last), memory=config.memory))]
    if config.compare or config.yardstick:
        lanes.append(lane(STOCK, placed(config.channels_last)))
    if config.yardstick:
        lanes.append(lane(YARDSTICK, placed(not config.channels_last), not config.channels_last))
    return lanes
