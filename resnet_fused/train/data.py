"""Datasets as uint8 tensors in memory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fashion
from .errors import UserError

NAMES = ("auto", "fashion-mnist", "digits", "synthetic", "folder:PATH")
_FOLDER_SIZE = 224  # pixels; the image size ResNets are published with
_SYNTHETIC_SIZE = 32
_HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images and labels of a classification task.

    Args:
        name: as given to ``--data``.  source: in words, where it came from.
        train_images, test_images: ``(N, C, H, W)`` uint8.  train_labels, test_labels: ``(N,)`` int64.
        classes: how many.  flippable: whether a mirrored image keeps its label.
        evaluated: what the test images are.  pixel_mean: whether each pixel has a mean of its own.
        scales: of the augmentation by scale (`augment`), or None.
    """

    name: str
    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    flippable: bool
    evaluated: str = "test"
    pixel_mean: bool = False
    scales: tuple[int, int] | None = None

    @property
    def fingerprint(self) -> str:
        """What must agree for a run to be resumed on this data."""
        shape = "x".join(str(n) for n in self.train_images.shape[1:])
        count, labels = len(self.train_labels), int(self.train_labels.sum())
        return f"{self.name}: {count} images of {shape}, {self.classes} classes, label sum {labels}"

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the training pixels per channel, ``(C, 1, 1)`` float32, of 0 to 1.

        With ``pixel_mean`` the mean image ``(C, H, W)``, and ones: He et al. 2015 only subtract.
        """
        if self.pixel_mean:
            total = self.train_images.sum(0, dtype=torch.float64)
            image = (total / (255 * len(self.train_images))).float()
            return image, torch.ones(len(image), 1, 1)
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in self.train_images.transpose(0, 1)])
        levels = torch.arange(256, dtype=torch.float64) / 255
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ levels
        std = (share @ levels.square() - mean.square()).clamp(min=1e-6).sqrt()
        return mean.float()[:, None, None], std.float()[:, None, None]


def _resize(images: Tensor, size: int) -> Tensor:
    if size in (0, images.shape[-1]):
        return images
    wide = F.interpolate(images.float(), size=(size, size), mode="bilinear", align_corners=False)
    return wide.round().clamp(0, 255).to(torch.uint8)


def _split(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hold out a fixed share for testing; the split does not depend on the run's seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    cut = int(len(labels) * _HELD_OUT)
    test, train = order[:cut], order[cut:]
    return images[train], labels[train], images[test], labels[test]


def _fashion_mnist(data_root: str, size: int) -> Dataset:
    root, source = fashion.find(data_root)
    from torchvision.datasets import FashionMNIST

    try:
        train, test = FashionMNIST(str(root), train=True), FashionMNIST(str(root), train=False)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"train: --data fashion-mnist: cannot read {root}: {error}") from error
    images = [_resize(part.data[:, None], size) for part in (train, test)]
    return Dataset("fashion-mnist", source, images[0], train.targets, images[1], test.targets, 10, True)


def _digits(size: int) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"train: --data digits needs scikit-learn: {error}") from error
    digits = load_digits()
    # Grey levels are 0 to 16, 8 x 8: twice that is the least that three stages of a CIFAR net can use.
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    return Dataset(
        "digits", "scikit-learn's handwritten digits", *_split(_resize(images, size or 16), labels), 10, False
    )


def _synthetic(size: int) -> Dataset:
    """Ten smooth random patterns under noise: learnable, the same on every machine, and nothing to fetch."""
    generator = torch.Generator().manual_seed(0)
    size = size or _SYNTHETIC_SIZE
    patterns = torch.randn(10, 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.randint(10, (2560,), generator=generator)
    noise = torch.randn(len(labels), 3, size, size, generator=generator)
    images = (128 + 30 * patterns[labels] + 50 * noise).clamp(0, 255).to(torch.uint8)
    return Dataset("synthetic", "generated", *_split(images, labels), 10, False)


def _read_folder(path: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise UserError(f"train: --data folder needs torchvision: {error}") from error
    crop = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    try:
        found = ImageFolder(str(path), transform=crop)
    except OSError as error:
        raise UserError(f"train: --data folder:{path}: expected one folder of images per class: {error}") from error
    need, have = len(found) * 3 * size * size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have // 2:
        raise UserError(
            f"train: --data folder:{path}: {len(found)} images need {need / 1e9:.0f} GB in memory, "
            f"more than half of this machine's {have / 1e9:.0f} GB; use a smaller --image-size"
        )
    images = torch.empty(len(found), 3, size, size, dtype=torch.uint8)
    for index, (file, _) in enumerate(found.samples):
        try:
            images[index] = found[index][0]
        except OSError as error:
            raise UserError(f"train: --data folder:{path}: cannot decode {file}: {error}") from error
    return images, torch.tensor(found.targets), found.classes


def _folder(path: Path, size: int) -> Dataset:
    """``path/train`` and ``path/val`` (or ``test``), else ``path`` itself with a fifth held out."""
    if not path.is_dir():
        raise UserError(f"train: --data folder:{path}: there is no such folder")
    size = size or _FOLDER_SIZE
    held_out = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if (path / "train").is_dir() and held_out is not None:
        images, labels, classes = _read_folder(path / "train", size)
        test_images, test_labels, test_classes = _read_folder(held_out, size)
        if classes != test_classes:
            raise UserError(f"train: --data folder:{path}: train and {held_out.name} have different classes")
        parts = (images, labels, test_images, test_labels)
    else:
        images, labels, classes = _read_folder(path, size)
        parts = _split(images, labels)
    return Dataset(f"folder:{path}", str(path), *parts, len(classes), True)


def load(name: str, data_root: str = "", image_size: int = 0) -> Dataset:
    """The dataset called ``name``.

    Args:
        name: one of `NAMES`; ``auto`` is Fashion-MNIST where it is or can be had, else the digits.
        data_root: where Fashion-MNIST is looked for first.
        image_size: pixels to resize to, 0 for its own.

    Raises:
        UserError: an unknown name, or data that is not there or cannot be read.
    """
    if name == "auto":
        try:
            return _fashion_mnist(data_root, image_size)
        except UserError as error:
            digits = _digits(image_size)
            return dataclasses.replace(digits, source=f"{digits.source}, because of: {error}")
    if name == "fashion-mnist":
        return _fashion_mnist(data_root, image_size)
    if name == "digits":
        return _digits(image_size)
    if name == "synthetic":
        return _synthetic(image_size)
    if name.startswith("folder:"):
        return _folder(Path(name.removeprefix("folder:")), image_size)
    raise UserError(f"train: --data: expected one of {', '.join(NAMES)}; got {name!r}")
