"""What a recipe and `--validation` make of a dataset before a run."""

from __future__ import annotations

import dataclasses

import torch

from .data import Dataset
from .errors import UserError
from .recipes import Recipe


def prepared(dataset: Dataset, validation: int, recipe: Recipe) -> Dataset:
    """The dataset that a run trains and is evaluated on.

    Args:
        dataset: as loaded.
        validation: training images to hold out and evaluate on, in place of the test images; 0 none. Which ones does
            not depend on the run's seed.
        recipe: says how images are centred and augmented.

    Raises:
        UserError: ``validation`` leaves no training image, or is negative.
    """
    count = len(dataset.train_labels)
    if not 0 <= validation < count:
        raise UserError(f"train: --validation: expected 0 to {count - 1} of the training images, got {validation}")
    dataset = dataclasses.replace(dataset, pixel_mean=recipe.pixel_mean, scales=recipe.scales)
    if not validation:
        return dataset
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held, train = order[:validation].sort().values, order[validation:].sort().values
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[train],
        train_labels=dataset.train_labels[train],
        test_images=dataset.train_images[held],
        test_labels=dataset.train_labels[held],
        evaluated="validation",
    )
