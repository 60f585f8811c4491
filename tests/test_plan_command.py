"""`resnet-fused plan`: the table, its totals, and one line for bad input."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_fused.cli import main
from resnet_fused.costs import SCHEME_NAMES

SMALL = ["plan", "cifar-20", "--batch", "16", "--amp", "bf16"]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    import contextlib
    import io

    file, out = tmp_path_factory.mktemp("plan") / "plan.json", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*SMALL, "--device", "a100", "--json", str(file)]) == 0
    return out.getvalue(), json.loads(file.read_text())


def test_every_scheme_and_every_layer_is_printed(printed):
    out, _ = printed
    assert all(scheme in out for scheme in SCHEME_NAMES)
    for words in ("cifar-20, 32 px, batch 16, autocast bf16, on a100", "layer3.2.conv2", "modelled", "largest batch"):
        assert words in out


def test_totals_are_the_sums_of_the_layers(printed):
    _, written = printed
    assert (written["image"], written["batch"], written["dtype"]) == (32, 16, "bf16")
    for total in written["totals"]:
        layers = written["layers"][total["scheme"]]
        for name in ("moved", "kept", "flops", "launches", "floor_s"):
            assert total[name] == pytest.approx(sum(layer[name] for layer in layers))
        assert total["moved"] == total["forward"] + total["backward"]
        assert total["largest_batch"] > 1000
    assert written["device"]["name"] == "a100"


def test_a_floor_is_no_less_than_all_bytes_by_the_bandwidth(printed):
    _, written = printed
    for total in written["totals"]:
        assert total["floor_s"] >= total["moved"] / written["device"]["bandwidth"]


def test_totals_alone(capsys):
    assert main([*SMALL, "--total", "--image", "16"]) == 0
    out = capsys.readouterr().out
    assert "layer3.2.conv2" not in out and "16 px" in out and "largest batch" in out


def test_this_cpu_is_a_device_too(capsys):
    assert main(["plan", "plain-20", "--batch", "8", "--device", "cpu", "--total"]) == 0
    assert "on cpu (measured here" in capsys.readouterr().out


def chainless():
    from torch import nn

    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "resnet51"], "--model: unknown model 'resnet51'; did you mean resnet50"),
        ([*SMALL, "--batch", "0"], "plan: --batch: expected at least 1, got 0"),
        ([*SMALL, "--image", "0"], "plan: --image: expected at least 1, got 0"),
        ([*SMALL, "--device", "h300"], "device: expected one of t4"),
        ([*SMALL, "--device", "t4"], "device t4: expected a precision of fp16, fp32, got bf16"),
        (["plan", "tests.test_plan_command:chainless"], "no block of the model can be fused"),
        ([*SMALL, "--total", "--json", "/nowhere/plan.json"], "plan: --json /nowhere/plan.json: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_unknown_dtype_is_refused():
    with pytest.raises(SystemExit) as stop:
        main(["plan", "cifar-20", "--amp", "int8"])
    assert stop.value.code == 2
