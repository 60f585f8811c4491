"""Ten crops and the fully convolutional form, against naive loops in stock torch, under the numerics law."""

from __future__ import annotations

import copy
import functools
import json
import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import eager_blocks as eager
from resnet_fused import evaluation, fuse
from resnet_fused.cli import main
from resnet_fused.eager import ResNet, StemConfig
from resnet_fused.numerics import assert_law

from .harness import LAYOUTS, randomise
from .test_train import tiny

TINY = "tests.test_train:tiny"


def net(**options: object) -> nn.Module:
    torch.manual_seed(0)
    stem = StemConfig(4, 3, 2, pool=False)
    return randomise(ResNet(eager.Bottleneck, [1, 1], 5, planes=[2, 3], out_channels=[4, 6], stem=stem, **options))  # type: ignore[arg-type]


def naive_ten_crop(model: nn.Module, images: Tensor, size: int) -> Tensor:
    """Crop by crop and image by image."""
    h, w = images.shape[2:]
    places = [(0, 0), (0, w - size), (h - size, 0), (h - size, w - size), ((h - size) // 2, (w - size) // 2)]
    rows = []
    for image in images:
        found = []
        for top, left in places:
            crop = image[:, top : top + size, left : left + size]
            found += [model(crop[None]), model(crop[:, :, torch.arange(size - 1, -1, -1)][None])]
        rows.append(torch.stack([F.softmax(logits[0], 0) for logits in found]).mean(0))
    return torch.stack(rows)


def naive_multi_scale(model: nn.Module, images: Tensor, scales: list[int], window: int) -> Tensor:
    """Scale by scale, place by place: the mean of a window of features, classified by the net's own layer."""
    rows = []
    for image in images:
        found = []
        for side in scales:
            h, w = image.shape[1:]
            size = (side, round(w * side / h)) if h < w else (round(h * side / w), side)
            x = F.interpolate(image[None], size, mode="bilinear", antialias=True)
            for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"):
                x = getattr(model, name)(x)
            p, q = (min(window, n) for n in x.shape[2:])
            places = [(i, j) for i in range(x.shape[2] - p + 1) for j in range(x.shape[3] - q + 1)]
            logits = [model.fc(x[0, :, i : i + p, j : j + q].mean((1, 2))) for i, j in places]
            found.append(torch.stack([F.softmax(each, 0) for each in logits]).mean(0))
        rows.append(torch.stack(found).mean(0))
    return torch.stack(rows)


@torch.no_grad()
def hold(ours, naive, model: nn.Module, images: Tensor) -> None:
    """Ours, on the fused and on the stock net, against the naive form on stock torch in float64."""
    model.eval()
    ref = naive(copy.deepcopy(model).double(), images.double())
    layouts = [
        naive(copy.deepcopy(model).to(memory_format=fmt), images.contiguous(memory_format=fmt))
        for fmt in LAYOUTS.values()
    ]
    for kind in (copy.deepcopy(model), fuse(copy.deepcopy(model))):
        got = ours(kind, images)
        assert_law({"scores": got}, {"scores": ref}, [{"scores": other} for other in layouts], torch.float32)
        torch.testing.assert_close(got.sum(1), torch.ones(len(images)))


@pytest.mark.parametrize(("shape", "size"), [((2, 3, 15, 12), 9), ((1, 3, 8, 8), 8)])
def test_ten_crops(shape: tuple[int, ...], size: int) -> None:
    ours = functools.partial(evaluation.ten_crop_scores, size=size)
    hold(ours, functools.partial(naive_ten_crop, size=size), net(), torch.randn(shape))


@pytest.mark.parametrize(
    ("shape", "scales", "window"), [((2, 3, 19, 27), [15, 23], 4), ((1, 3, 20, 13), [13, 8, 31], 3)]
)
def test_scales_of_odd_sizes(shape: tuple[int, ...], scales: list[int], window: int) -> None:
    ours = functools.partial(evaluation.multi_scale_scores, scales=scales, window=window)
    naive = functools.partial(naive_multi_scale, scales=scales, window=window)
    hold(ours, naive, net(), torch.randn(shape))


def test_the_trained_size_gives_the_nets_own_scores() -> None:
    """There the window is the feature map: one place, the forward's own pooling."""
    model, images = net().eval(), torch.randn(3, 3, 16, 16)
    window = evaluation.feature_window(model, 16)
    assert window == 4
    for softmax in (True, False):
        own = evaluation.scores(model, images, softmax=softmax)
        dense = evaluation.fully_convolutional_scores(model, images, window, softmax=softmax)
        torch.testing.assert_close(dense, own)
    with torch.no_grad():
        assert torch.equal(evaluation.scores(model, images, softmax=False), model(images))


def test_the_papers_sizes_on_an_imagenet_net() -> None:
    from resnet_fused.resnet import resnet18

    with torch.device("meta"):
        model = resnet18(fused=False).eval()
        assert evaluation.feature_window(model, 224) == 7
        assert evaluation.multi_scale_scores(model, torch.empty(1, 3, 301, 225)).shape == (1, 1000)


def test_the_model_is_left_as_it_was() -> None:
    model = fuse(net()).train()
    model.layer1.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    evaluation.multi_scale_scores(model, torch.randn(2, 3, 12, 14), (9, 12), 2)
    assert not evaluation.ten_crop_scores(model, torch.randn(2, 3, 12, 14), 9).requires_grad
    assert modes == [m.training for m in model.modules()] and not model.avgpool._forward_pre_hooks
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_errors_are_counted() -> None:
    table = torch.eye(8)
    batches = [(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3])), (torch.tensor([4]), torch.tensor([7]))]
    # Every wrong class scores 0, so ranks below the first go by index: label 3 is among the first five, 7 is not.
    found = evaluation.evaluate(lambda index: table[index] - 1e-3 * torch.arange(8), batches)
    assert found == evaluation.Evaluation(4, 0.5, 0.25)
    with pytest.raises(ValueError, match="at least one image, got none"):
        evaluation.evaluate(lambda index: index, [])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: evaluation.ten_crop_scores(m, x, 13), "size: expected 1 to 12 pixels of images of 12x14, got 13"),
        (lambda m, x: evaluation.ten_crop_scores(m, x[0], 8), r"images: expected \(N, C, H, W\) floats"),
        (lambda m, x: evaluation.multi_scale_scores(m, x, ()), "scales: expected pixels, at least one"),
        (lambda m, x: evaluation.fully_convolutional_scores(m, x, 0), "window: expected at least 1, got 0"),
        (lambda m, x: evaluation.fully_convolutional_scores(m.layer1, x), "one nn.Linear, got 0 and 0"),
    ],
)
def test_bad_input(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(net(), torch.randn(1, 3, 12, 14))


def test_command(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--data", "synthetic", "--image-size", "8", "--batch-size", "8", "--iterations", "3", "--threads", "1"]
    flags = ["--recipe", "he2015-cifar", "--validation", "99"]
    assert main(["train", "--model", TINY, *flags, *common, "--out", "run"]) == 0
    capsys.readouterr()
    results = {}
    for name, method in {"1": [], "10": ["--crops", "10"], "scales": ["--scales", "8,11"]}.items():
        assert main(["evaluate", "--checkpoint", "run", *method, "--json", f"{name}.json"]) == 0
        assert "top-1 error" in capsys.readouterr().out
        results[name] = json.loads(pathlib.Path(f"{name}.json").read_text())
    assert [r["method"] for r in results.values()] == [
        "1 crop of 8", "10 crops of 7", "fully convolutional, shorter sides 8,11, window 2",
    ]  # fmt: skip
    assert all(result["images"] == 512 and 0 <= result["top_5"] <= result["top_1"] <= 1 for result in results.values())
    assert main(["evaluate", "--checkpoint", "run", "--stock", "--limit", "30", "--batch", "7"]) == 0
    assert "30 images" in capsys.readouterr().out
    torch.save(tiny().state_dict(), "bare.pt")
    for arguments, words in (
        ([], "--model: expected a model"),
        (["--model", TINY], "expected --checkpoint or --weights, one of the two"),
        (["--checkpoint", "bare.pt"], "--model: expected a model"),
        (["--checkpoint", "run", "--scales", "a"], "--scales: expected pixels as 224,256, got 'a'"),
        (["--checkpoint", "run", "--scales", "8", "--crops", "10"], "--scales: expected without --crops"),
        (["--checkpoint", "run", "--crops", "10", "--crop", "9"], "size: expected 1 to 8 pixels"),
        (["--checkpoint", "run", "--batch", "0"], "--batch, --limit: expected positive numbers, got 0 and 0"),
    ):
        assert main(["evaluate", *arguments]) == 2
        assert words in capsys.readouterr().err
