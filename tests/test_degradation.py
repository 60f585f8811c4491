"""Plain against residual nets: the command trains each once, goes on where it was stopped, and draws."""

import io
import json
import pathlib

import pytest
import torch

from resnet_fused.cli import main
from resnet_fused.eager import PlainBlock
from resnet_fused.train import Stop, TrainConfig, UserError, checkpoint, degradation
from resnet_fused.train.models import build_model

COMMAND = ["degradation", "--depths", "8,14", "--iterations", "4", "--data", "synthetic", "--image-size", "8"]
COMMAND += ["--batch-size", "8", "--threads", "1", "--out", "found"]
NETS = ["plain-8", "cifar-8", "plain-14", "cifar-14"]


@pytest.fixture(autouse=True)
def in_a_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_nets_are_trained_once_and_drawn(capsys):
    assert main(COMMAND) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: 4 iterations" in out for name in NETS) and "training error" in out
    document = json.loads(pathlib.Path("found/degradation.json").read_text())
    assert [(run["model"], run["plain"]) for run in document["runs"]] == [(n, n.startswith("plain")) for n in NETS]
    for run in document["runs"]:
        state = checkpoint.load(pathlib.Path("found", run["model"]))
        assert run["training"]["iteration"] == [1, 2, 3, 4]
        assert run["training"]["error"] == state["history"]["errors"]["fused"].tolist()
        last = state["history"]["evaluations"][-1]
        assert run["evaluation"]["error"][-1] == 1 - last["accuracy"]["fused"] and last["iteration"] == 4
    plain = build_model("plain-14")
    assert all(isinstance(block, PlainBlock) for block in plain.layer1)
    plain.load_state_dict(torch.load("found/plain-14/checkpoint.pt", weights_only=True)["model"])
    before = {name: pathlib.Path("found", name, "checkpoint.pt").stat().st_mtime_ns for name in NETS}
    assert main(COMMAND) == 0
    assert capsys.readouterr().out.count("finished before") == len(NETS)
    assert before == {name: pathlib.Path("found", name, "checkpoint.pt").stat().st_mtime_ns for name in NETS}
    assert json.loads(pathlib.Path("found/degradation.json").read_text()) == document
    assert main([*COMMAND, "--seed", "1"]) == 2
    assert "holds a run with other settings: seed 0, not 1" in capsys.readouterr().err
    pytest.importorskip("matplotlib", reason="the picture is matplotlib's")
    assert pathlib.Path("found/degradation.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_bitwise(dataset, monkeypatch):
    base = TrainConfig(data="synthetic", batch_size=8, iterations=4, checkpoint_every=4, image_size=8, threads=1)
    net, stream = degradation.Net(8, True), io.StringIO()
    whole = degradation.train_net(net, base, dataset, pathlib.Path("whole"), Stop(), stream)
    stop = Stop()

    def signal_at_two(progress, iteration, text):
        stop.signal = 2 if iteration == 2 else 0

    with monkeypatch.context() as patch:
        patch.setattr(degradation.Progress, "update", signal_at_two)
        assert degradation.train_net(net, base, dataset, pathlib.Path("cut"), stop, stream) is None
    assert checkpoint.load(pathlib.Path("cut/plain-8"))["iteration"] == 2
    assert degradation.train_net(net, base, dataset, pathlib.Path("cut"), Stop(), stream) == whole


def test_train_takes_plain_nets_by_the_papers_recipe(capsys):
    flags = ["--model", "plain", "--depth", "8", "--recipe", "he2015-cifar", "--validation", "40"]
    common = ["--data", "synthetic", "--image-size", "8", "--batch-size", "8", "--iterations", "2", "--threads", "1"]
    assert main(["train", *flags, *common, "--out", "run"]) == 0
    assert "validation accuracy fused" in capsys.readouterr().out
    config = checkpoint.load(pathlib.Path("run"))["config"]
    assert (config["model"], config["recipe"], config["validation"]) == ("plain-8", "he2015-cifar", 40)
    assert main(["train", "--resume", "run", "--depth", "14"]) == 2
    assert "does not go with --model" in capsys.readouterr().err


def test_deep_nets_get_the_held_start(dataset, monkeypatch):
    seen = []

    def refuse(config):
        seen.append((config.model, config.recipe))
        raise UserError("far enough")

    monkeypatch.setattr(degradation, "check_fits", refuse)
    for net in degradation.nets([56, 110]):
        with pytest.raises(UserError, match="far enough"):
            base = TrainConfig(recipe="he2015-cifar")
            degradation.train_net(net, base, dataset, pathlib.Path("out"), Stop(), io.StringIO())
    deep = "he2015-cifar-110"
    assert seen == [
        ("plain-56", "he2015-cifar"),
        ("cifar-56", "he2015-cifar"),
        ("plain-110", deep),
        ("cifar-110", deep),
    ]


@pytest.mark.parametrize(
    ("depths", "words"),
    [
        ("20,21", "--depths: expected different depths of 6n + 2 (20,56), got 20,21"),
        ("20,20", "--depths: expected different depths"),
        ("deep", "--depths: expected numbers as 20,56, got 'deep'"),
    ],
)
def test_bad_depths(depths, words, capsys):
    assert main(["degradation", "--depths", depths, "--data", "synthetic"]) == 2
    assert words in capsys.readouterr().err
