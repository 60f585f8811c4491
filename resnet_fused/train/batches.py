"""Batches as a function of (seed, iteration): resuming needs no more than the iteration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import colour_components, scale_crop_and_flip
from .data import Dataset
from .errors import UserError
from .ranks import ALONE, Ranks

_EVAL_BATCH = 500
_PADDING_SHARE = 8  # pad by an eighth of the image: 4 pixels of 32, as He et al. 2015 do


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    # Hashed, because torch's CPU generator uses only the low 32 bits of a seed, and sums would let runs share batches.
    digest = hashlib.blake2b(f"{seed} {stream} {index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def crop_and_flip(
    images: Tensor, padding: int, flip: bool, generator: torch.Generator, part: slice | None = None, of: int = 0
) -> Tensor:
    """Pad by ``padding`` zeros, crop at random to the old size, mirror half of the images when ``flip``.

    Args:
        images: ``(N, C, H, W)``, any dtype.
        padding: pixels on each side.
        flip: whether to mirror.
        generator: where the randomness comes from.
        part, of: ``images`` are this part of a batch of ``of``, and are treated as in the whole; None: all of it.

    Returns:
        The same shape and dtype; one gather, no loop over the images.
    """
    n, c, h, w = images.shape
    total, part = (n, slice(None)) if part is None else (of, part)
    padded = F.pad(images, (padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, total, 1), generator=generator)[:, part]
    mirrored = torch.rand(total, 1, generator=generator)[part] < 0.5 if flip else torch.zeros(n, 1, dtype=torch.bool)
    rows = top + torch.arange(h)
    columns = left + torch.where(mirrored, torch.arange(w - 1, -1, -1), torch.arange(w))
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    return padded.flatten(2).gather(2, pixels.flatten(1)[:, None].expand(n, c, h * w)).view(n, c, h, w)


class Batches:
    """Normalised float32 batches of a dataset.

    Args:
        batch_size: images per iteration; the last, short batch of an epoch is left out.
        augment: crop, and mirror where the data allows it.
        channels: what the model reads; grey images are repeated to three.
        channels_last: the memory format of the images handed out.
        ranks: this process hands out its part of every batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        augment: bool,
        channels: int,
        channels_last: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        count, own = len(dataset.train_labels), dataset.train_images.shape[1]
        if not 1 <= batch_size <= count:
            raise UserError(
                f"train: --batch-size: expected 1 to {count}, the training images there are; got {batch_size}"
            )
        if channels != own and own != 1:
            raise UserError(f"train: --model reads {channels} channels, the images of --data have {own}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.channels = channels
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.ranks = ranks
        self.per_epoch = count // batch_size
        self._mean, self._std = dataset.moments()
        self._components = colour_components(dataset.train_images) if dataset.scales and own == channels else None
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def _normalise(self, images: Tensor) -> Tensor:
        floats = ((images.float() / 255 - self._mean) / self._std).expand(-1, self.channels, -1, -1)
        return floats.contiguous(memory_format=self.memory_format)

    def train(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Images ``(N, C, H, W)`` float32 and labels ``(N,)`` int64 of step ``iteration``, counted from 0.

        What is drawn is drawn for the whole batch, so that it does not depend on the number of ranks.
        """
        epoch, step = divmod(iteration, self.per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(len(self.dataset.train_labels), generator=_generator(self.seed, 0, epoch))
            self._epoch = epoch
        chosen = self._order[step * self.batch_size : (step + 1) * self.batch_size]
        part, total = self.ranks.part(len(chosen)), len(chosen)
        chosen = chosen[part]
        images = self.dataset.train_images[chosen]
        if self.augment and self.dataset.scales is not None:
            draws = _generator(self.seed, 1, iteration)
            scales, flip = self.dataset.scales, self.dataset.flippable
            images = scale_crop_and_flip(images, scales, flip, self._components, draws, part, total)
        elif self.augment:
            padding = max(1, round(images.shape[-1] / _PADDING_SHARE))
            draws = _generator(self.seed, 1, iteration)
            images = crop_and_flip(images, padding, self.dataset.flippable, draws, part, total)
        return self._normalise(images), self.dataset.train_labels[chosen]

    @property
    def test_count(self) -> int:
        """Batches of test images, of all ranks together: rank r has every size-th of them from the r-th on."""
        return len(self.dataset.test_labels.split(_EVAL_BATCH))

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images in order; on several ranks the batches that are this one's."""
        for number, (images, labels) in enumerate(
            zip(self.dataset.test_images.split(_EVAL_BATCH), self.dataset.test_labels.split(_EVAL_BATCH))
        ):
            if number % self.ranks.size == self.ranks.rank:
                yield self._normalise(images), labels
