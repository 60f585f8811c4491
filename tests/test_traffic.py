"""Counted bytes: the table of passes, the operators of eager, and what our launches move, against its bounds."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from resnet_fused import counting, passes, traffic
from resnet_fused.cli import main
from resnet_fused.resnet import BUILDERS
from tests.emulation import runner

VERSION = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
CASES = "tests.emulation.traffic_cases"
SMALL = ["traffic", "cifar-20", "--image", "32", "--batch", "8"]
BF16 = torch.bfloat16
IMAGE = {"resnet50": 224, "resnet18": 224}
# MB per image, forward and backward, as published beside the table of passes; their sum may be rounded either way.
PUBLISHED = {
    ("resnet50", "eager"): (180, 285),
    ("resnet50", "inductor"): (113, 260),
    ("resnet50", "mlperf"): (75, 194),
    ("resnet18", "eager"): 101,
    ("resnet18", "inductor"): 82,
    ("resnet18", "mlperf"): 56,
}
BOUNDS = {"resnet50": {"block": 270, "stage": 245, "trunk": 237}, "resnet18": {"block": 55, "stage": 53, "trunk": 50}}


def _stock(network: str) -> torch.nn.Module:
    return counting.on_meta(lambda: BUILDERS[network](fused=False), BF16)


@pytest.fixture(scope="module", params=IMAGE)
def network(request):
    model = _stock(request.param)
    return request.param, passes.sites(model, IMAGE[request.param])


def test_the_table_comes_to_the_published_totals(network):
    name, found = network
    for scheme in passes.SCHEMES:
        halves = [value / passes.MB for value in passes.modelled(found, scheme)]
        published = PUBLISHED[name, scheme]
        assert (tuple(map(round, halves)) if isinstance(published, tuple) else round(sum(halves))) == published


def test_every_convolution_is_a_site_of_its_kind(network):
    name, found = network
    expected = {
        "resnet50": {"relu": 33, "add": 16, "projection": 4},
        "resnet18": {"relu": 9, "add": 8, "projection": 3},
    }
    assert Counter(site.kind for site in found) == expected[name]
    assert found[0].conv == "conv1" and found[0].elements == 64 * 112 * 112
    assert sum(site.last for site in found if site.kind == "add") == 4


def test_the_bounds_follow_from_our_passes(network):
    name, found = network
    assert {extent: passes.bound_mb(found, extent) for extent in passes.EXTENTS} == BOUNDS[name]


def test_eager_is_counted_operator_by_operator():
    model = _stock("resnet50")
    step = counting.count_eager(model, counting.meta_images(8, 224, BF16))
    convolutions, relus, adds = 53, 49, 16
    # Per site: convolution and batch norm, forward and backward, and the counter of batches. The pools and the
    # classifier: max pool, mean, addmm; two mm, sum, div, max pool.
    assert step.operators == convolutions * 5 + relus * 2 + adds * 2 + 3 + 5
    assert step.launches == 0


def test_eager_reads_each_tensor_once_per_operator():
    model = counting.on_meta(lambda: BUILDERS["plain-20"](fused=False), BF16)
    step = counting.count_eager(model, counting.meta_images(8, 32, BF16))
    # Per site W; R W; R W; R forward and W; R; 2R W; 2R W; R backward. The average pool's backward makes up for
    # the last site's missing wgrad; the image is read twice, and the pooled features are written.
    outputs = sum(site.elements for site in passes.sites(model, 32))
    assert step.per_image("activations") == 2 * (15 * outputs + 2 * 3 * 32 * 32 + 64)


def test_views_and_allocations_are_no_operators():
    with counting.OperatorCount(torch.nn.Linear(2, 2)) as count:
        x = torch.empty(4, 4).t().view(2, 2, 4).detach()
        x.add_(1)
    assert [record.name for record in count.records] == ["aten.add_.Tensor"]
    assert count.records[0].bytes == {"activations": (0, 0), "weights": (64, 64)}


@pytest.fixture(scope="module")
def reports():
    return {name: traffic.compare(name, 256, image, "bf16") for name, image in IMAGE.items()}


@pytest.mark.parametrize("extent", passes.EXTENTS)
@pytest.mark.parametrize("name", IMAGE)
def test_a_step_moves_no_more_than_its_bound(reports, name, extent):
    line = reports[name]["extents"][extent]
    assert line["activations"] <= line["bound"] == BOUNDS[name][extent]
    assert line["weights"] + line["partials"] <= passes.REST_BOUND_MB
    assert not line["over"]
    assert line["activations"] < reports[name]["eager"]["activations"]


@pytest.fixture(scope="module")
def counted():
    return {extent: traffic.count_passes(extent) for extent in passes.EXTENTS}


@pytest.mark.parametrize("extent", passes.EXTENTS)
def test_passes_per_site_are_those_of_the_table(counted, extent):
    # A join may keep the mask as bits beside the activation: a sixteenth of a pass, twice, instead of a whole one.
    most = passes.OURS["add" if extent == "block" else "joined"]
    assert counted[extent].relu == passes.OURS["relu"]
    assert sum(counted[extent].add) <= sum(most)
    assert [int(value) for value in counted[extent].add] <= list(most)


@pytest.mark.parametrize("extent", ("trunk", "block"))
def test_a_planted_pass_is_noticed(counted, extent, monkeypatch):
    from resnet_fused.engines import triton_site
    from resnet_fused.kernels.bn_stats import bn_stats

    genuine = triton_site.conv_fwd

    def wasteful(*arguments, **options):
        y, *rest = genuine(*arguments, **options)
        bn_stats(y)
        return y, *rest

    monkeypatch.setattr(triton_site, "conv_fwd", wasteful)
    before, after = counted[extent], traffic.count_passes(extent)
    assert after.relu == (before.relu[0] + 1, before.relu[1])
    assert after.add == (before.add[0] + 1, before.add[1])


def test_a_pass_by_an_operator_is_noticed(counted, monkeypatch):
    from resnet_fused.engines import triton_site

    genuine = triton_site.conv_dgrad

    def copying(*arguments, **options):
        dx, *rest = genuine(*arguments, **options)
        return dx.clone(memory_format=torch.preserve_format), *rest

    monkeypatch.setattr(triton_site, "conv_dgrad", copying)
    before = counted["trunk"].relu
    assert traffic.count_passes("trunk").relu == (before[0], before[1] + 2)


@pytest.mark.skipif(VERSION < (3, 8), reason="the harness repairs the interpreter of Triton 3.8")
@pytest.mark.parametrize("case", ["case_trunk", pytest.param("case_block", marks=pytest.mark.full)])
def test_launches_move_what_they_say(case):
    """On real tensors the interpreter sees the bytes that are counted on meta tensors."""
    assert runner.run_cases(CASES, [case]) == {case: ""}


def test_the_command_prints_all_extents_and_writes_them(tmp_path, monkeypatch, capsys):
    file = tmp_path / "traffic.json"
    assert main([*SMALL, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for words in ("extent trunk", "extent stage", "extent block", "MLPerf", "Inductor", "2 / 7", "7 / 12"):
        assert words in out
    written = json.loads(file.read_text())
    assert set(written["extents"]) == set(passes.EXTENTS) and set(written["schemes"]) == set(passes.SCHEMES)


def test_the_command_fails_over_the_bound(monkeypatch, capsys):
    monkeypatch.setattr(passes, "_ALLOWANCE", 0.5)
    assert main([*SMALL, "--extent", "trunk"]) == 1
    out = capsys.readouterr().out
    assert "OVER" in out and "extent block" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["traffic", "resnet51"], "model: expected one of resnet18"),
        ([*SMALL, "--batch", "0"], "--batch: expected at least 1"),
        ([*SMALL, "--extent", "trunk", "--json", "/nowhere/traffic.json"], "--json /nowhere/traffic.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
