"""Checkpoint files, and ``resnet-fused convert``."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import ConversionError, convert, convert_file
from resnet_fused.checkpoints import FORMATS
from resnet_fused.cli import main
from resnet_fused.eager import BasicBlock, ResNet, StemConfig
from tests.models import checkpoints as models
from tests.models import source_a, source_b
from tests.test_convert_models import resnetl
from tests.test_convert_optimizer import train


@pytest.fixture(autouse=True)
def in_a_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ours() -> nn.Module:
    return ResNet(BasicBlock, (1, 2), 10, planes=(8, 16), stem=StemConfig(8, 3, 1, pool=False))


def theirs() -> nn.Module:
    return models.CIFARNet(source_b.ResidualBlock, (1, 2), 8)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_command_writes_what_loads(capsys):
    source = theirs()
    torch.save(source.state_dict(), "in.pth")
    assert main(["convert", "in.pth", "out.pth", "--to", "torchvision"]) == 0
    out = capsys.readouterr().out
    assert "kuangliu (read alike as akamaster) to torchvision: " in out and "written: out.pth" in out
    there = torch.load("out.pth", weights_only=True)
    ours().load_state_dict(there, strict=True)
    assert same(there, convert(source.state_dict()))
    assert main(["convert", "out.pth", "back.pth", "--to", "kuangliu", "--from", "torchvision"]) == 0
    assert same(torch.load("back.pth", weights_only=True), source.state_dict())


def test_help_tells_the_formats(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    out = capsys.readouterr().out
    assert all(f"  {form.name} " in out and form.about in out for form in FORMATS.values())


def test_the_report_alone(capsys):
    torch.save(theirs().state_dict(), "in.pth")
    assert main(["convert", "in.pth"]) == 0
    assert os.listdir() == ["in.pth"] and "written" not in capsys.readouterr().out


def test_refusals_leave_no_file_and_exit_with_one(capsys):
    torch.save({**ours().state_dict(), "extra": torch.zeros(1)}, "in.pth")
    assert main(["convert", "in.pth", "out.pth", "--from", "torchvision"]) == 1
    assert "torchvision has no meaning for 1 keys: extra" in capsys.readouterr().err
    assert main(["convert", "in.pth", "out.pth", "--to", "detectron2", "--lenient"]) == 1
    assert "detectron2 has no place for a classifier" in capsys.readouterr().err
    assert os.listdir() == ["in.pth"]
    command = ["convert", "in.pth", "out.pth", "--to", "detectron2", "--drop", "fc", "--drop", "ext*"]
    assert main([*command, "--dst-prefix", "trunk."]) == 0
    assert "left out, asked for: extra, fc.weight, fc.bias" in capsys.readouterr().out
    assert next(iter(torch.load("out.pth", weights_only=True))) == "trunk.stem.conv1.weight"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.pth", "out.pth"], "error: convert: none.pth: No such file or directory"),
        (["in.pth", "none/out.pth"], "No such file or directory"),
        (
            ["in.pth", "out.pth", "--stages", "3,x"],
            "convert: --stages: expected numbers as in 3,4,6,3, got '3,x'",
        ),
    ],
)
def test_bad_input(arguments, words, capsys):
    torch.save(theirs().state_dict(), "in.pth")
    assert main(["convert", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip"])
@pytest.mark.parametrize("name", ["in.pth", "in.safetensors"])
def test_damaged_files(name, content, capsys):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors", reason="safetensors is not a dependency")
    with open(name, "wb") as file:
        file.write(content)
    assert main(["convert", name, "out.pth"]) == 1
    assert f"convert: {name}: " in capsys.readouterr().err


def test_a_file_cut_anywhere_is_refused():
    torch.save(theirs().state_dict(), "in.pth")
    with open("in.pth", "rb") as file:
        whole = file.read()
    for length in range(1, len(whole), len(whole) // 20):
        with open("cut.pth", "wb") as file:
            file.write(whole[:length])
        with pytest.raises(ConversionError, match=r"cut.pth: torch.load\(weights_only=True\) refuses it"):
            convert_file("cut.pth", None)


def test_code_in_a_file_is_not_run():
    torch.save({"state_dict": ours().state_dict(), "run": os.system}, "in.pth")
    with pytest.raises(ConversionError, match=r"in.pth: torch.load\(weights_only=True\) refuses it"):
        convert_file("in.pth", "out.pth")


def test_a_checkpoint_keeps_its_other_entries():
    source, _ = resnetl(deep=False)
    optimizer = torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9)
    train(source, optimizer, 0)
    average = torch.optim.swa_utils.AveragedModel(source)
    checkpoint = {
        "epoch": 3,
        "state_dict": {"module." + key: value for key, value in source.state_dict().items()},
        "state_dict_ema": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 3},
    }
    torch.save(checkpoint, "in.pth")
    report = convert_file("in.pth", "out.pth")
    assert report.notes[-2:] == ("also converted: state_dict_ema, optimizer", "kept as they are: epoch, scheduler")
    there = torch.load("out.pth", weights_only=True)
    assert list(there) == list(checkpoint) and there["epoch"] == 3 and there["scheduler"] == {"last_epoch": 3}
    assert same(there["state_dict"], convert(source.state_dict()))
    assert list(there["state_dict_ema"]) == list(there["state_dict"])
    _, net = resnetl(deep=False)
    net.load_state_dict(there["state_dict"], strict=True)
    again = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    again.load_state_dict(there["optimizer"])
    assert torch.equal(train(net, again, 1), train(source, optimizer, 1))
    assert same(net.state_dict(), convert(source.state_dict()))


def test_what_cannot_be_converted_beside_the_model_is_left_out_and_named():
    source = theirs()
    groups = [{"params": [p]} for p in source.parameters()]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9).state_dict()
    broken = {**source.state_dict(), "extra": torch.zeros(1)}
    torch.save({"net": source.state_dict(), "ema": broken, "optimizer": optimizer, "acc": 93.0}, "in.pth")
    report = convert_file("in.pth", "out.pth")
    assert sorted(torch.load("out.pth", weights_only=True)) == ["acc", "net"]
    notes = "\n".join(report.notes)
    assert "left out: ema: convert: src: kuangliu has no meaning for 1 keys: extra" in notes
    assert "left out: optimizer: convert_optimizer: names: expected the names" in notes
    assert "kept as they are: acc" in notes


def test_lightnings_checkpoint():
    source = theirs()
    optimizer = torch.optim.Adam(source.parameters())
    train(source, optimizer, 0)
    state = {"model." + key: value for key, value in source.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state, "optimizer_states": [optimizer.state_dict()]}, "in.ckpt")
    report = convert_file("in.ckpt", "out.ckpt")
    assert report.wrappers == ("entry state_dict", "model.")
    there = torch.load("out.ckpt", weights_only=True)
    assert same(there["state_dict"], convert(source.state_dict()))
    assert len(there["optimizer_states"][0]["state"]) == len(optimizer.state_dict()["state"])


def test_nested_twice():
    source = theirs()
    torch.save({"model": {"state_dict": source.state_dict(), "version": 2}, "epoch": 1}, "in.pth")
    report = convert_file("in.pth", "out.pth")
    there = torch.load("out.pth", weights_only=True)
    assert same(there["model"]["state_dict"], convert(source.state_dict()))
    assert there["model"]["version"] == 2 and there["epoch"] == 1
    assert report.notes == ("kept as they are: version", "kept as they are: epoch")


def test_safetensors_both_ways():
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not a dependency")
    source = theirs().to(memory_format=torch.channels_last)
    torch.save({"net": source.state_dict(), "acc": 93.0}, "in.pth")
    report = convert_file("in.pth", "out.safetensors")
    assert report.notes == ("left out, as a .safetensors file holds tensors only: acc",)
    there = library.load_file("out.safetensors")
    expected = convert(source.state_dict())
    assert there.keys() == expected.keys() and all(torch.equal(there[key], expected[key]) for key in there)
    convert_file("out.safetensors", "back.pth", dst="kuangliu")
    assert same(torch.load("back.pth", weights_only=True), source.state_dict())


def test_without_safetensors(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    for path in ("in.safetensors", "in.pth"):
        torch.save(theirs().state_dict(), "in.pth")
        with pytest.raises(ConversionError, match="need safetensors, which is not installed"):
            convert_file(path, "out.safetensors")
    assert not os.path.exists("out.safetensors")


def test_a_write_that_fails_keeps_the_old_file(monkeypatch):
    torch.save(theirs().state_dict(), "in.pth")
    with open("out.pth", "wb") as file:
        file.write(b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["convert", "in.pth", "out.pth"]) == 2
    assert sorted(os.listdir()) == ["in.pth", "out.pth"]
    with open("out.pth", "rb") as file:
        assert file.read() == b"old"


def test_stages_and_entry_of_the_command(capsys):
    net = source_a.ResNetBase((2, 2), (8, 8))
    torch.save({"model": net.state_dict(), "ema": net.state_dict()}, "in.pth")
    assert main(["convert", "in.pth", "out.pth", "--stages", "1,3", "--entry", "ema"]) == 0
    assert "stages of 1+3 blocks" in capsys.readouterr().out
    there = torch.load("out.pth", weights_only=True)
    assert "layer2.2.conv1.weight" in there["ema"] and "layer2.2.conv1.weight" in there["model"]
