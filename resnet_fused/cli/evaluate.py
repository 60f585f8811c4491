"""Test a net as the paper does: by one crop or ten, or fully convolutionally over scales; top-1 and top-5 error.

A checkpoint of `resnet-fused train` brings its model, its data and how its images were normalised. With --weights,
torchvision's, images are normalised as those weights want it. Images are squares of --image-size pixels; --scales
resizes them from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._console import MODEL_HELP

HELP = "top-1 and top-5 error by 1 or 10 crops, or over several scales"
_WHAT = "evaluate: --checkpoint"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    from ..train.data import NAMES

    parser.add_argument("--model", default="", help=f"{MODEL_HELP} (default: the checkpoint's)")
    parser.add_argument("--checkpoint", default="", metavar="PATH", help="a run's folder, or a state_dict")
    parser.add_argument("--weights", nargs="?", const="DEFAULT", help="pretrained weights by torchvision's name")
    parser.add_argument("--data", default="", help=f"one of {', '.join(NAMES)} (default: the checkpoint's, else auto)")
    parser.add_argument("--data-root", default="", metavar="DIR", help="where Fashion-MNIST is looked for first")
    parser.add_argument(
        "--image-size", type=int, default=0, metavar="N", help="resize images to this many pixels first"
    )
    parser.add_argument("--crops", type=int, choices=(1, 10), default=1, help="default: 1, the middle")
    parser.add_argument(
        "--crop", type=int, default=0, metavar="N", help="pixels of a crop (default: all; of ten, 7/8 of the image)"
    )
    parser.add_argument(
        "--scales",
        default="",
        metavar="N,N",
        help="fully convolutional, shorter sides of these pixels",
    )
    parser.add_argument(
        "--trained-size",
        type=int,
        default=0,
        metavar="N",
        help="what the net was trained on (default: the image's)",
    )
    parser.add_argument("--batch", type=int, default=50, metavar="N", help="images at a time (default: 50)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="test only the first N images")
    parser.add_argument("--stock", action="store_true", help="do not fuse the net")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--json", metavar="FILE", help="write the result here")


def run(args: argparse.Namespace) -> int:
    """Load, score, print."""
    import dataclasses

    from ..evaluation import evaluate
    from ..train import UserError
    from ._console import write_json

    if args.scales and (args.crops == 10 or args.crop):
        raise UserError("evaluate: --scales: expected without --crops and --crop, the whole images are scored")
    model, name, dataset = _loaded(args)
    scores, method = _method(args, model, dataset)
    try:
        found = evaluate(scores, _batches(args, model, dataset))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"evaluate: {name}: {str(error).strip().splitlines()[0]}") from error
    print(f"{name} on {dataset.name} ({dataset.evaluated}, {found.images} images), {method}")
    print(f"top-1 error {found.top_1:.2%}, top-5 error {found.top_5:.2%}")
    if args.json:
        document = {"model": name, "data": dataset.name, "method": method, **dataclasses.asdict(found)}
        write_json(args.json, document, "evaluate")
    return 0


def _loaded(args: argparse.Namespace) -> tuple[Any, str, Any]:
    """The net, its name and its data."""
    import dataclasses

    import torch

    from ..fuse import fuse
    from ..train import UserError
    from ..train.data import load
    from ..train.models import build_model
    from ..train.prepare import prepared
    from ..train.recipes import find_recipe
    from ..train.weights import load_weights, read_weights

    weights = read_weights(Path(args.checkpoint), _WHAT) if args.checkpoint else None
    settings: dict[str, Any] = {} if weights is None else weights.config
    name = args.model or settings.get("model", "")
    if not name:
        raise UserError("evaluate: --model: expected a model, or a --checkpoint of a run, which names its own")
    if (weights is None) == (args.weights is None):
        raise UserError("evaluate: expected --checkpoint or --weights, one of the two")
    size = args.image_size or settings.get("image_size", 0)
    dataset = load(args.data or settings.get("data", "auto"), args.data_root, size)
    tested: dict[str, Any] = {
        "test_images": dataset.test_images,
        "test_labels": dataset.test_labels,
        "evaluated": dataset.evaluated,
    }
    if settings:  # normalised as in the run, by the images it trained on
        dataset = prepared(dataset, settings.get("validation", 0), find_recipe(settings["recipe"]))
    dataset = dataclasses.replace(dataset, **tested)
    if weights is None:
        model = build_model(name, weights=args.weights)
    else:
        model = build_model(name, num_classes=dataset.classes, in_channels=dataset.train_images.shape[1])
        load_weights(model, weights, name, _WHAT)
    model = model.to(args.device).to(memory_format=torch.channels_last)
    return (model if args.stock else fuse(model)).eval(), name, dataset


def _method(args: argparse.Namespace, model: Any, dataset: Any) -> tuple[Any, str]:
    """Images to scores, and how in words."""
    import functools

    from .. import evaluation
    from ..train import UserError

    size = min(dataset.test_images.shape[-2:])
    if args.scales:
        parts = args.scales.split(",")
        if not all(part.strip().isdigit() and int(part) for part in parts):
            raise UserError(f"evaluate: --scales: expected pixels as 224,256, got {args.scales!r}")
        scales = [int(part) for part in parts]
        window = evaluation.feature_window(model, args.trained_size or size, dataset.test_images.shape[1])
        scores = functools.partial(evaluation.multi_scale_scores, model, scales=scales, window=window)
        return scores, f"fully convolutional, shorter sides {args.scales}, window {window}"
    crop = args.crop or (round(size * 7 / 8) if args.crops == 10 else size)
    if args.crops == 10:
        return functools.partial(evaluation.ten_crop_scores, model, size=crop), f"10 crops of {crop}"
    return lambda images: evaluation.scores(model, evaluation.center_crop(images, crop)), f"1 crop of {crop}"


def _batches(args: argparse.Namespace, model: Any, dataset: Any) -> Any:
    """Test images, normalised as the net wants them, on its device, with their labels."""
    import dataclasses

    import torch

    from ..train import UserError
    from ..train.batches import Batches
    from ..train.models import input_channels

    if args.batch < 1 or args.limit < 0:
        raise UserError(f"evaluate: --batch, --limit: expected positive numbers, got {args.batch} and {args.limit}")
    count = args.limit or len(dataset.test_labels)
    shown: dict[str, Any] = {"test_images": dataset.test_images[:count], "test_labels": dataset.test_labels[:count]}
    dataset, channels = dataclasses.replace(dataset, **shown), input_channels(model)
    if args.weights is None:
        normalised = Batches(dataset, 1, 0, False, channels, True).test()
    else:
        mean, std = (torch.tensor(values)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD))
        whole = zip(dataset.test_images.split(args.batch), dataset.test_labels.split(args.batch))
        normalised = (((images.float() / 255 - mean) / std, labels) for images, labels in whole)
    for images, labels in normalised:
        for part, truth in zip(images.split(args.batch), labels.split(args.batch)):
            yield part.to(args.device, memory_format=torch.channels_last), truth
