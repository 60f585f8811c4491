"""The command line: exit codes, one-line errors, Ctrl-C, and what each command prints."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from resnet_fused.cli import main
from resnet_fused.resnet import cifar_resnet

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = "tests.test_train:tiny"
TRAIN = ["train", "--model", TINY, "--data", "synthetic", "--image-size", "8", "--batch-size", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def in_a_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_train_then_finished_resume(capsys):
    assert main([*TRAIN, "--iterations", "8", "--compare", "--out", "run"]) == 0
    out = capsys.readouterr().out
    for words in (
        "fused beside stock",
        "test accuracy",
        "MB for backward",
        "loss, fused - stock",
        "checkpoint",
        "curves",
    ):
        assert words in out
    lines = [json.loads(line) for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("train") == 8
    assert lines[0]["event"] == "config" and lines[-1]["event"] == "summary"
    assert all(set(line["loss"]) == {"fused", "stock"} for line in lines if line["event"] == "train")
    assert main(["train", "--resume", "run"]) == 0
    assert "test accuracy" in capsys.readouterr().out


def test_runs_get_folders_of_their_own(capsys):
    for number in (1, 2):
        assert main([*TRAIN, "--iterations", "1"]) == 0
        assert pathlib.Path("runs", f"tests.test_train-tiny-{number}", "checkpoint.pt").is_file()
    capsys.readouterr()


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    command = [sys.executable, "-m", "resnet_fused", *TRAIN, "--iterations", "100000", "--eval-every", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    # One line in 500 steps: the second one says that training is under way.
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n") > 1:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"resnet-fused train --resume {tmp_path / 'run'}" in out
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert 0 < state["iteration"] < 100_000
    assert len(state["history"]["losses"]["fused"]) == state["iteration"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--model", "resnet51"], "did you mean resnet50"),
        (["train", "--recipe", "slow"], "--recipe: expected one of quick"),
        (["train", "--model", TINY, "--data", "imagenet"], "--data: expected one of auto"),
        (["train", "--model", TINY, "--data", "folder:nowhere"], "there is no such folder"),
        (["train", "--resume", "nowhere"], "there is no such checkpoint"),
        (["train", "--resume", "foreign.pt"], "expected a checkpoint of"),
        (["train", "--resume", "damaged.pt"], "damaged, or not a checkpoint"),
        ([*TRAIN, "--out", "file/run"], "--out file/run: cannot be made"),
        ([*TRAIN, "--out", "old"], "holds a run already"),
        ([*TRAIN, "--iterations", "-1"], "--iterations: expected a positive number"),
        ([*TRAIN[:-4], "--batch-size", "99999"], "--batch-size: expected 1 to"),
        ([*TRAIN, "--device", "nonsense"], "--device: cannot use 'nonsense'"),
        (["check", "--model", TINY, "--batch", "0"], "check: shape: expected"),
        (["explain", "--model", "torchvision:nothing"], "torchvision has no model 'nothing'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys):
    torch.save(cifar_resnet(8).state_dict(), "foreign.pt")
    pathlib.Path("damaged.pt").write_bytes(b"PK\x03\x04 cut short")
    pathlib.Path("file").touch()
    pathlib.Path("old").mkdir()
    pathlib.Path("old", "checkpoint.pt").touch()
    if "torchvision:nothing" in arguments:
        pytest.importorskip("torchvision", reason="the name is looked up in torchvision")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1


def test_resume_takes_no_other_settings(capsys):
    assert main([*TRAIN, "--iterations", "2", "--out", "run"]) == 0
    assert main(["train", "--resume", "run", "--lr", "0.5"]) == 2
    assert "does not go with --lr" in capsys.readouterr().err


def test_argparse_errors_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--memory", "huge"])
    assert stop.value.code == 2 and "--memory" in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in out for name in ("train", "check", "doctor", "explain"))
    for name in ("train", "check", "doctor", "explain"):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0 and f"resnet-fused {name}" in capsys.readouterr().out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "self test: PASS" in out and torch.__version__ in out and "reference" in out


def test_doctor_reports_a_failing_self_test(capsys, monkeypatch):
    from resnet_fused import checking

    def broken(*_, **__):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(checking, "check", broken)
    assert main(["doctor"]) == 1
    assert "self test: FAIL: RuntimeError: illegal instruction" in capsys.readouterr().out


def test_check_and_its_exit_code(capsys, monkeypatch):
    arguments = ["check", "--model", TINY, "--batch", "4", "--image", "16"]
    assert main(arguments) == 0
    assert "PASS: " in capsys.readouterr().out
    from resnet_fused import fuse as package_fuse  # noqa: F401  the module must be imported before it is patched

    def wrong(model, **_):
        model.layer1[0].bn1.eps = 0.5
        return model

    monkeypatch.setattr(sys.modules["resnet_fused.fuse"], "fuse", wrong)
    assert main(arguments) == 1
    assert "FAIL  output" in capsys.readouterr().out


def test_explain(capsys):
    assert main(["explain", "--model", TINY]) == 0
    assert "layer1.0" in capsys.readouterr().out
