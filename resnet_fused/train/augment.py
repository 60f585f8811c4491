"""The paper's augmentation of ImageNet: scale, crop, mirror, and the colour shift along principal components."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CROP = 224  # pixels of the paper's crop, of which its scales are multiples
COLOUR_SPREAD = 0.1  # standard deviation of the shift along each component, in its own deviations


def colour_components(images: Tensor) -> Tensor:
    """Principal components of the pixels' colours, each as long as its standard deviation.

    Args:
        images: ``(N, C, H, W)`` uint8.

    Returns:
        ``(C, C)`` float32, one component a column, in units of a pixel's 0 to 255.
    """
    pixels = images.transpose(0, 1).flatten(1).double()
    pixels -= pixels.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(pixels @ pixels.T / max(1, pixels.shape[1]))
    return (vectors * values.clamp(min=0).sqrt()).float()


def scale_crop_and_flip(
    images: Tensor,
    scales: tuple[int, int],
    flip: bool,
    components: Tensor | None,
    generator: torch.Generator,
    part: slice | None = None,
    of: int = 0,
) -> Tensor:
    """Enlarge each image by a random scale, crop it at random to its old size, mirror half of them, shift the colours.

    Args:
        images: ``(N, C, H, W)`` uint8.
        scales: the least and the largest shorter side, in pixels for a crop of 224; for another size in proportion.
        flip: whether to mirror.
        components: of `colour_components`, or None for no colour shift.
        generator: where the randomness comes from.
        part, of: ``images`` are this part of a batch of ``of``, and are treated as in the whole; None: all of it.

    Returns:
        The same shape, float32, in units of a pixel's 0 to 255, beyond them where the shift leads there.
    """
    n, c, h, w = images.shape
    total, part = (n, slice(None)) if part is None else (of, part)
    sides = torch.randint(scales[0], scales[1] + 1, (total,), generator=generator)[part].tolist()
    places = torch.rand(total, 2, generator=generator)[part]
    mirrored = (torch.rand(total, generator=generator)[part] < 0.5).tolist()
    shifts = COLOUR_SPREAD * torch.randn(total, c, generator=generator)[part]
    out = torch.empty(n, c, h, w)
    for i, (side, place) in enumerate(zip(sides, places)):
        size = (round(h * side / CROP), round(w * side / CROP))
        wide = F.interpolate(images[i : i + 1].float(), size, mode="bilinear", align_corners=False, antialias=True)
        top, left = (int(share * (big - small + 1)) for share, big, small in zip(place.tolist(), size, (h, w)))
        crop = wide[0, :, top : top + h, left : left + w]
        out[i] = crop.flip(-1) if flip and mirrored[i] else crop
    return out if components is None else out + (shifts @ components.T)[:, :, None, None]
