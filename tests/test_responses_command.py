"""``resnet-fused responses``: the table, the files, and what it refuses."""

import argparse
import json
import pathlib

import pytest
import torch

from resnet_fused.cli import main
from resnet_fused.cli.responses import _nets
from resnet_fused.resnet import plain
from tests.test_train import tiny

TINY, PLAIN = "tests.test_train:tiny", "tests.test_responses_command:tiny_plain"
COMMON = ["--data", "synthetic", "--image-size", "8", "--batch", "8"]


def tiny_plain(num_classes=10, in_channels=3, fused=True):
    return plain(8, num_classes=num_classes, in_channels=in_channels, fused=fused)


@pytest.fixture(autouse=True)
def in_a_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_nets_are_overlaid_and_runs_are_read(capsys):
    settings = ["--data", "synthetic", "--image-size", "8", "--batch-size", "8", "--iterations", "2", "--threads", "1"]
    assert main(["train", "--model", TINY, *settings, "--out", "run"]) == 0
    model = tiny_plain()
    torch.nn.init.constant_(model.layer3[0].bn2.weight, 3.0)
    torch.save({"state_dict": model.state_dict()}, "plain.pt")
    capsys.readouterr()
    nets = ["--model", TINY, PLAIN, "--checkpoint", "run", "plain.pt"]
    assert main(["responses", *nets, *COMMON, "--out", "found"]) == 0
    out = capsys.readouterr().out
    assert "layer3.0.conv2" in out and "closed form" in out and "run/checkpoint.pt" in out
    document = json.loads(pathlib.Path("found/responses.json").read_text())
    assert [(net["model"], net["plain"]) for net in document["models"]] == [(TINY, False), (PLAIN, True)]
    *_, last = document["models"][1]["layers"]
    assert last["name"] == "layer3.0.conv2" and round(last["std"], 2) == 3
    assert all(net["batches"] == 2 and len(net["layers"]) == 7 for net in document["models"])
    pytest.importorskip("matplotlib", reason="the picture is matplotlib's")
    assert pathlib.Path("found/responses.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_names_its_model_and_all_layers_are_shown(capsys):
    torch.save({"format": "resnet_fused.train", "config": {"model": TINY, "data": "synthetic"},
                "model": tiny().state_dict()}, "run.pt")  # fmt: skip
    assert main(["responses", "--checkpoint", "run.pt", *COMMON, "--kernel", "all", "--batches", "1"]) == 0
    assert "7 layers over 1 batch" in capsys.readouterr().out
    assert pathlib.Path("responses.json").is_file()


@pytest.mark.parametrize(("name", "twin"), [("cifar-20", "plain-20"), ("resnet34", "plain-34")])
def test_plain_adds_the_plain_twin(name, twin):
    assert _nets(argparse.Namespace(model=[name], checkpoint=[], plain=True)) == [(name, None), (twin, None)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", TINY, "--plain"], "--plain: expected a --model that has a plain twin (plain-18"),
        (["--model", TINY, "--checkpoint", "nowhere"], "--checkpoint nowhere: there is no such checkpoint"),
        (["--model", TINY, "--checkpoint", "damaged.pt"], "damaged, or not a checkpoint"),
        (["--model", TINY, "--checkpoint", "list.pt"], "expected a run's checkpoint or a state_dict, got list"),
        (["--checkpoint", "plain.pt"], "a state_dict does not name its model; expected --model"),
        (["--model", TINY, TINY, "--checkpoint", "plain.pt"], "expected one for each of"),
        (["--model", "cifar-20", "--checkpoint", "plain.pt"], "does not fit --model cifar-20"),
        (["--model", TINY, "--kernel", "big"], "kernel: expected '3x3'"),
        (["--model", TINY, "--batch", "1"], "--batch, --batches: expected at least 2 and 1, got 1 and 2"),
        (["--model", TINY, "--out", "damaged.pt"], "--out damaged.pt: cannot be made"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    pathlib.Path("damaged.pt").write_bytes(b"PK\x03\x04 cut short")
    torch.save([1], "list.pt")
    torch.save(tiny_plain().state_dict(), "plain.pt")
    assert main(["responses", *COMMON, *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
