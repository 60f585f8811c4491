"""`explain` for given images: a record per site, with bytes, FLOPs, a bound and reasons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnet_fused import explain, fuse
from resnet_fused.cli import main
from resnet_fused.resnet import BUILDERS


@pytest.fixture(scope="module")
def explained():
    return explain(fuse(BUILDERS["cifar-20"](fused=False)), torch.empty(4, 3, 32, 32))


def test_every_convolution_is_explained(explained):
    convs = [name for name, m in BUILDERS["cifar-20"](fused=False).named_modules() if isinstance(m, nn.Conv2d)]
    assert [record.plan.conv for record in explained.sites] == convs


def test_figures_follow_from_the_shapes(explained):
    record = next(r for r in explained.sites if r.plan.conv == "layer1.0.conv1")
    pixels = 4 * 32 * 32
    assert record.flops == 3 * 2 * pixels * 16 * 16 * 9
    tensor = 4 * pixels * 16
    assert record.moved > 5 * tensor and record.kept >= tensor
    assert record.bound in ("memory", "compute") and record.seconds > 0


def test_the_stem_computes_no_gradient_of_the_image(explained):
    record = explained.sites[0]
    assert record.flops == 2 * 2 * 4 * 32 * 32 * 3 * 16 * 9


def test_it_prints_every_site_and_every_reason_once(explained):
    text = str(explained)
    assert all(record.plan.conv in text for record in explained.sites)
    assert text.count("materialised: on the CPU a join is a pass of its own") == 1
    assert "bound: cpu, measured here" in text and "4x3x32x32" in text and "3x3/2 16->32" in text


def test_memory_modes_keep_less():
    x = torch.empty(2, 3, 32, 32)
    kept = {}
    for memory in ("speed", "min"):
        found = explain(fuse(BUILDERS["cifar-20"](fused=False), memory=memory), x)
        kept[memory] = sum(record.kept for record in found.sites)
    assert 0 < kept["min"] < kept["speed"]


def test_autocast_says_its_dtype():
    model = fuse(BUILDERS["cifar-20"](fused=False))
    with torch.autocast("cpu", torch.bfloat16):
        found = explain(model, torch.empty(2, 3, 32, 32))
    assert {record.plan.shape.dtype for record in found.sites} == {torch.bfloat16}


def test_without_images_or_without_fused_blocks_there_are_no_sites():
    model = BUILDERS["cifar-20"](fused=False)
    assert explain(model, torch.empty(2, 3, 32, 32)).sites == []
    assert explain(fuse(model)).sites == []


def test_the_model_is_not_touched():
    model = fuse(BUILDERS["cifar-20"](fused=False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bindings = [dict(module.__dict__) for module in model.modules()]
    explain(model, torch.empty(2, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [dict(module.__dict__).keys() for module in model.modules()] == [b.keys() for b in bindings]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ((2, 3, 32, 32), TypeError, "explain: x: expected a tensor, got tuple"),
        (torch.empty(3, 32, 32), ValueError, r"explain: x: expected floating-point \(N, C, H, W\), got torch.float32"),
        (torch.empty(1, 3, 8, 8, dtype=torch.uint8), ValueError, "got torch.uint8"),
    ],
)
def test_wrong_images_are_refused(x, error, words):
    with pytest.raises(error, match=words):
        explain(fuse(BUILDERS["cifar-20"](fused=False)), x)


def test_the_command_prints_sites(capsys):
    assert main(["explain", "--model", "cifar-20", "--batch", "2", "--image", "32"]) == 0
    out = capsys.readouterr().out
    assert "layer3.2.conv2" in out and "bound, modelled" in out


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--batch", "2", "--image", "0"]])
def test_the_command_refuses_no_images(flags, capsys):
    assert main(["explain", "--model", "cifar-20", *flags]) == 2
    assert "expected at least 1, got 0" in capsys.readouterr().err
