"""The training loop: lanes in turn on the same batches, metrics, checkpoints, a clean stop."""

from __future__ import annotations

import dataclasses
import signal
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, compare, plot
from .batches import Batches
from .config import TrainConfig
from .data import Dataset
from .errors import UserError
from .history import History, MetricsFile, NoMetrics
from .lanes import FUSED, Lane, build_lanes
from .memory import kept_for_backward
from .models import build_model, input_channels
from .prepare import prepared
from .progress import Progress
from .ranks import ALONE, Ranks
from .recipes import Recipe, Schedule, find_recipe

_RATE_WINDOW = 20
_METRICS_PER_RUN = 200


class Stop:
    """Set by SIGINT or SIGTERM; the loop finishes its step and saves. A second signal ends it at once."""

    def __init__(self) -> None:
        self.signal = 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.default_int_handler)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle the two signals inside; handlers of before are put back."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def complete(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """``config`` with the recipe's values and torch's threads filled in: what a checkpoint keeps.

    Raises:
        UserError: a number out of range.
    """
    recipe = find_recipe(config.recipe)
    dataset = prepared(dataset, config.validation, recipe)
    for name in ("epochs", "iterations", "batch_size", "lr", "image_size", "threads", "eval_every", "checkpoint_every"):
        value = getattr(config, name)
        if value < 0:
            raise UserError(f"train: --{name.replace('_', '-')}: expected a positive number, got {value}")
    batch_size = config.batch_size or min(recipe.batch_size, len(dataset.train_labels))
    if not 1 <= batch_size <= len(dataset.train_labels):
        raise UserError(f"train: --batch-size: expected 1 to {len(dataset.train_labels)}, got {batch_size}")
    iterations = config.iterations or recipe.iterations
    if config.epochs:
        iterations = config.epochs * (len(dataset.train_labels) // batch_size)
    tenth = max(1, iterations // 10)
    return dataclasses.replace(
        config,
        data="digits" if config.data == "auto" and dataset.name == "digits" else dataset.name,
        batch_size=batch_size,
        iterations=iterations,
        epochs=0,
        lr=config.lr or recipe.lr,
        threads=config.threads or torch.get_num_threads(),
        eval_every=config.eval_every or tenth,
        checkpoint_every=config.checkpoint_every or tenth,
    )


class Trainer:
    """One run.

    Args:
        config: made whole by `complete`.  dataset: what ``config.data`` names.  out: the run's folder.
        state: a checkpoint of `checkpoint.load` to go on from, or None.
        ranks: the processes that train together; every one of them makes a Trainer, and calls what the others call.

    Raises:
        UserError: the model, the data and the settings do not fit together, or ``out`` cannot be written to.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        out: Path,
        state: dict[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        torch.set_num_threads(config.threads)
        self.ranks = ranks
        self.config = config
        self.dataset = dataset = prepared(dataset, config.validation, find_recipe(config.recipe))
        self.out = out
        recipe: Recipe = find_recipe(config.recipe)
        images = dataset.train_images
        self.lanes: list[Lane] = build_lanes(config, recipe, dataset.classes, images.shape[1], ranks)
        channels = input_channels(self.lanes[0].model)
        self.batches = Batches(
            dataset, config.batch_size, config.seed, recipe.augment, channels, config.channels_last, ranks
        )
        self.schedule = Schedule(recipe, config.lr, config.iterations)
        self.history = History([lane.name for lane in self.lanes], dataset.evaluated)
        self.iteration = 0
        if state is not None:
            self._load(state)
        self._saved = self.iteration
        resume_at = self.iteration if state is not None else None
        self.metrics = MetricsFile(out, resume_at) if ranks.first else NoMetrics()
        if state is None:
            self.metrics.write("config", 0, **config.to_dict(), dataset=dataset.fingerprint)

    def _state(self) -> dict[str, Any]:
        lanes = {lane.name: lane.state_dict() for lane in self.lanes}
        return {
            "config": self.config.to_dict(),
            "data": self.dataset.fingerprint,
            "iteration": self.iteration,
            "model": lanes[FUSED]["model"],
            "lanes": lanes,
            "schedule": self.schedule.state_dict(),
            "rng": {"cpu": torch.get_rng_state(), "cuda": self._gpu_rng()},
            "history": self.history.state_dict(),
        }

    def _gpu_rng(self) -> list[Tensor]:
        """Of all GPUs alone; of several ranks' GPUs, which draw alike, that of this one."""
        if not torch.cuda.is_available():
            return []
        return torch.cuda.get_rng_state_all() if self.ranks.size == 1 else [torch.cuda.get_rng_state()]

    def _load(self, state: dict[str, Any]) -> None:
        if state["data"] != self.dataset.fingerprint:
            raise UserError(
                f"train: --resume: the run was on other data ({state['data']}); found {self.dataset.fingerprint}"
            )
        for lane in self.lanes:
            lane.load_state_dict(state["lanes"][lane.name])
        self.schedule.load_state_dict(state["schedule"])
        self.history.load_state_dict(state["history"])
        self.iteration = state["iteration"]
        torch.set_rng_state(state["rng"]["cpu"])
        saved = state["rng"]["cuda"]
        if torch.cuda.is_available() and saved and self.ranks.size > 1:
            torch.cuda.set_rng_state(saved[0])
        elif torch.cuda.is_available() and len(saved) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved)

    @property
    def stands_in(self) -> bool:
        """Whether stock's batch norm is not torch's own, which refuses the CPU: its speed then says nothing."""
        return self.ranks.size > 1 and self.config.sync_bn and self.config.device == "cpu"

    @property
    def checkpoint(self) -> Path:
        """Where the run's checkpoint is."""
        return self.out / checkpoint.NAME

    def run(self, progress: Progress, stop: Stop) -> bool:
        """Train to the end or to a signal, saving on the way; True when the run is complete.

        A signal to any rank stops all of them after the same step, and is then in ``stop`` on each.
        """
        config, total = self.config, self.config.iterations
        while self.iteration < total and not self.ranks.agreed(stop.signal):
            self._step(progress)
            if self.iteration % config.eval_every == 0 or self.iteration == total:
                self._evaluate(progress)
            if self.iteration % config.checkpoint_every == 0 or self.iteration == total:
                self.ranks.from_first(self._save)
        if self.iteration < total:
            stop.signal = self.ranks.agreed(stop.signal)
        self.ranks.from_first(self._save)
        return self.iteration >= total

    def _save(self) -> None:
        if self._saved != self.iteration or not self.checkpoint.exists():
            checkpoint.save(self.checkpoint, self._state())
            self._saved = self.iteration

    def _step(self, progress: Progress) -> None:
        images, labels = self.batches.train(self.iteration)
        lr = self.schedule.lr(self.iteration)
        # Every other iteration in the opposite order: neither lane always finds the caches warm.
        order = self.lanes if self.iteration % 2 else self.lanes[::-1]
        results = {lane.name: lane.step(images, labels, lr, self.config.batch_size) for lane in order}
        self.schedule.observe(results[FUSED].error)
        self.iteration += 1
        for lane in self.lanes:
            self.history.losses[lane.name].append(results[lane.name].loss)
            self.history.seconds[lane.name].append(results[lane.name].seconds)
            self.history.errors[lane.name].append(results[lane.name].error)
        rates = {
            name: self.config.batch_size / statistics.median(values[-_RATE_WINDOW:])
            for name, values in self.history.seconds.items()
        }
        total = self.config.iterations
        if self.iteration % max(1, total // _METRICS_PER_RUN) == 0 or self.iteration == total:
            losses = {lane.name: results[lane.name].loss for lane in self.lanes}
            epoch = self.iteration / self.batches.per_epoch
            self.metrics.write("train", self.iteration, epoch=epoch, lr=lr, loss=losses, images_per_second=rates)
        text = "  ".join(f"{n}: loss {results[n].loss:.4f}, {rates[n]:.0f} img/s" for n in self.history.lanes)
        progress.update(self.iteration, text)

    def _evaluate(self, progress: Progress) -> None:
        results = {lane.name: lane.evaluate(self.batches) for lane in self.lanes}
        accuracy = {name: result[0] for name, result in results.items()}
        loss = {name: result[1] for name, result in results.items()}
        self.history.evaluations.append({"iteration": self.iteration, "accuracy": accuracy, "loss": loss})
        self.metrics.write("eval", self.iteration, accuracy=accuracy, loss=loss)
        words = ", ".join(f"{name} {value:.2%}" for name, value in accuracy.items())
        progress.say(f"iteration {self.iteration}: {self.dataset.evaluated} accuracy {words}")

    def finish(self) -> tuple[list[str], Path | None]:
        """Sum the run up: lines for a person, and the path of the curves' PNG (None without matplotlib).

        Every rank must call it; only the first makes the PNG.
        """
        images, _ = self.batches.train(0)
        kept = {}
        for lane in self.lanes:
            mine = kept_for_backward(lane.model, lane.place(images), lane.autocast())
            kept[lane.name] = round(self.ranks.total([mine])[0])
        summary = compare.summarise(self.history, self.config.batch_size, kept, not self.stands_in)
        self.metrics.write("summary", self.iteration, **summary)
        lines = compare.describe(summary, self.config.batch_size)
        title = f"{self.config.model} on {self.config.data}, {self.iteration} iterations"
        return lines, plot.draw(self.history, title, lines, self.out) if self.ranks.first else None

    def close(self) -> None:
        """Close the metrics file."""
        self.metrics.close()


def check_fits(config: TrainConfig) -> None:
    """Refuse what can be refused before any data is loaded.

    Raises:
        UserError: an unknown model, recipe or device.
    """
    find_recipe(config.recipe)
    build_model(config.model)
    try:
        torch.empty(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"train: --device: cannot use {config.device!r}: {reason}") from error
