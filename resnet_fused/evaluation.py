"""How the paper tests: ten crops, and the net as a fully convolutional one over several scales (He et al. 2015, 3.4).

A crop's score is the net's. In the fully convolutional form the pooling before the classifier becomes a window that
slides over the last feature map and the classifier a 1x1 convolution; the scores of all places are averaged, then those
of all scales. Every image size serves, odd ones too. Scores are class probabilities: AlexNet's and VGG's papers, to
which this one points, average what the softmax gives; ``softmax=False`` averages the logits instead.

All functions run the model in eval mode and without gradients, fused or stock, and leave every mode as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (224, 256, 384, 480, 640)  # the paper's shorter sides, in pixels
TOP = 5


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's mode as before, afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _scores(logits: Tensor, softmax: bool) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.softmax(1) if softmax else wide


def scores(model: nn.Module, images: Tensor, *, softmax: bool = True) -> Tensor:
    """A net's scores of whole images: ``(N, C, H, W)`` to ``(N, K)``, float32 or wider.

    Raises:
        ValueError: ``images`` are no such tensor.
    """
    _check_images(images, "scores")
    with _evaluating(model):
        return _scores(model(images), softmax)


def _check_images(images: Tensor, name: str) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"{name}: images: expected (N, C, H, W) floats, got {images.dtype} of {tuple(images.shape)}")


def center_crop(images: Tensor, size: int) -> Tensor:
    """The middle ``(N, C, size, size)`` of ``(N, C, H, W)``, nearer the top left where it does not fit evenly.

    Raises:
        ValueError: an image is smaller.
    """
    h, w = images.shape[-2:]
    if not 1 <= size <= min(h, w):
        raise ValueError(f"crop: size: expected 1 to {min(h, w)} pixels of images of {h}x{w}, got {size}")
    top, left = (h - size) // 2, (w - size) // 2
    return images[..., top : top + size, left : left + size]


def ten_crop(images: Tensor, size: int) -> Tensor:
    """Four corners and the middle, then the same mirrored: ``(N, C, H, W)`` to ``(10, N, C, size, size)``.

    Raises:
        ValueError: an image is smaller.
    """
    middle = center_crop(images, size)
    bottom, right = images.shape[-2] - size, images.shape[-1] - size
    corners = [images[..., t : t + size, s : s + size] for t in (0, bottom) for s in (0, right)]
    crops = torch.stack([*corners, middle])
    return torch.cat([crops, crops.flip(-1)])


def ten_crop_scores(model: nn.Module, images: Tensor, size: int = 224, *, softmax: bool = True) -> Tensor:
    """Scores averaged over ten crops.

    Args:
        model: ``(N, C, size, size)`` to logits ``(N, K)``.
        images: ``(N, C, H, W)``, normalised, on the model's device; H and W at least ``size``.
        size: of a crop, pixels.
        softmax: average probabilities, else logits.

    Returns:
        ``(N, K)``, float32 or wider.

    Raises:
        ValueError: ``images`` are no such tensor.
    """
    _check_images(images, "ten_crop_scores")
    crops = ten_crop(images, size)
    with _evaluating(model):
        return torch.stack([_scores(model(crop), softmax) for crop in crops]).mean(0)


def _head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The global average pool and the classifier behind it."""
    pools = [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size in (1, (1, 1))]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if len(pools) != 1 or len(linears) != 1:
        raise ValueError(
            "fully_convolutional_scores: model: expected one global nn.AdaptiveAvgPool2d and one nn.Linear, "
            f"got {len(pools)} and {len(linears)}"
        )
    return pools[0], linears[0]


def _features(model: nn.Module, images: Tensor, pool: nn.Module) -> Tensor:
    """What the pool is given."""
    seen: list[Tensor] = []
    hook = pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(images)
    finally:
        hook.remove()
    return seen[0]


def feature_window(model: nn.Module, size: int, channels: int = 3) -> int:
    """The side of the feature map that the pool sees for images of ``size`` pixels: 7 for an ImageNet net at 224.

    Raises:
        ValueError: as `fully_convolutional_scores`.
    """
    weight = next(model.parameters())
    pool, _ = _head(model)
    with _evaluating(model):
        return _features(model, weight.new_zeros(1, channels, size, size), pool).shape[-1]


def fully_convolutional_scores(model: nn.Module, images: Tensor, window: int = 7, *, softmax: bool = True) -> Tensor:
    """Scores averaged over all places at which the pool's window fits into the last feature map.

    Args:
        model: with one global average pool and one linear classifier behind it, as every net of the family.
        images: ``(N, C, H, W)`` of any size the net takes, normalised, on the model's device.
        window: side of the pool's window: of the feature map at the size the net was trained on (`feature_window`);
            cut where the feature map is smaller.
        softmax: average probabilities, else logits.

    Returns:
        ``(N, K)``, float32 or wider.

    Raises:
        ValueError: ``images`` are no such tensor, ``window`` is less than 1, or the model has another head.
    """
    _check_images(images, "fully_convolutional_scores")
    if window < 1:
        raise ValueError(f"fully_convolutional_scores: window: expected at least 1, got {window}")
    pool, classifier = _head(model)
    with _evaluating(model):
        features = _features(model, images, pool).contiguous()
        if features.shape[1] != classifier.in_features:
            raise ValueError(
                "fully_convolutional_scores: model: expected a classifier of the pooled "
                f"{features.shape[1]} channels, got one of {classifier.in_features}"
            )
        sides = [min(window, side) for side in features.shape[-2:]]
        pooled = F.avg_pool2d(features, sides, 1)
        weight = classifier.weight[:, :, None, None].to(pooled.dtype)
        bias = None if classifier.bias is None else classifier.bias.to(pooled.dtype)
        return _scores(F.conv2d(pooled, weight, bias), softmax).mean((2, 3))


def resize_shorter(images: Tensor, side: int) -> Tensor:
    """Scale ``(N, C, H, W)`` to a shorter side of ``side`` pixels, its shape kept; bilinear, antialiased."""
    h, w = images.shape[-2:]
    short = min(h, w)
    size = (side, max(side, round(w * side / short))) if h <= w else (max(side, round(h * side / short)), side)
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def multi_scale_scores(
    model: nn.Module, images: Tensor, scales: Sequence[int] = SCALES, window: int = 7, *, softmax: bool = True
) -> Tensor:
    """`fully_convolutional_scores` averaged over images resized to several shorter sides.

    Args:
        model, images, window, softmax: as there.
        scales: shorter sides, pixels.

    Returns:
        ``(N, K)``, float32 or wider.

    Raises:
        ValueError: as there, or ``scales`` is empty or has a side less than 1.
    """
    _check_images(images, "multi_scale_scores")
    if not scales or min(scales) < 1:
        raise ValueError(f"multi_scale_scores: scales: expected pixels, at least one scale, got {list(scales)}")
    found = [fully_convolutional_scores(model, resize_shorter(images, s), window, softmax=softmax) for s in scales]
    return torch.stack(found).mean(0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Errors as shares of 1, over ``images``; ``top_5`` is of fewer classes where there are fewer."""

    images: int
    top_1: float
    top_5: float


def evaluate(score: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Top-1 and top-5 error.

    Args:
        score: images ``(N, C, H, W)`` to ``(N, K)``, one of the functions here with its model.
        batches: ``(images, labels)``.

    Raises:
        ValueError: there is no image.
    """
    count, first, within = 0, 0, 0
    for images, labels in batches:
        found = score(images)
        ranked = found.topk(min(TOP, found.shape[1])).indices == labels.to(found.device)[:, None]
        count += len(labels)
        first += int(ranked[:, 0].sum())
        within += int(ranked.any(1).sum())
    if not count:
        raise ValueError("evaluate: batches: expected at least one image, got none")
    return Evaluation(count, 1 - first / count, 1 - within / count)
