"""`resnet-fused tune`: what it prints and writes, its exit codes, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from resnet_fused import winners
from resnet_fused.cli import doctor, main
from resnet_fused.tuning.measure import Measurement
from resnet_fused.winners import store
from tests.tune_harness import cpu_name, no_winners

__all__ = ["no_winners"]
COMMAND = ["tune", "--model", "tests.test_train:tiny", "--batch", "2", "--image", "8", "--time", "2"]


def test_the_command_prints_and_writes(capsys, tmp_path):
    assert main([*COMMAND, "--cache", str(tmp_path), "--json", str(tmp_path / "report.txt")]) == 0
    captured = capsys.readouterr()
    assert "decisions" in captured.out
    found = json.loads((tmp_path / "report.txt").read_text())
    assert found["device"] == cpu_name() and {"measured", "step", "written", "digest"} <= set(found)


def test_ctrl_c_in_the_command_prints_what_is_finished(capsys, monkeypatch):
    monkeypatch.setattr(Measurement, "run", mock.Mock(side_effect=KeyboardInterrupt))
    assert main(COMMAND) == 130
    assert "interrupted" in capsys.readouterr().out


def test_doctor_says_what_is_in_use(capsys):
    store.save(cpu_name(), {f"{cpu_name()} | p": winners.Winner("own", "measured")}, store.folder())
    assert doctor._tuned() == f"1 measured choices, {store.path_of(cpu_name(), store.folder())}"
    winners.replace({}, [cpu_name()])
    assert doctor._tuned().startswith("no measured choices")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet51"], "did you mean resnet50"),
        (["--dtype", "fp8"], "tune: --dtype: expected one of fp32"),
        (["--device", "nonsense"], "tune: --device: expected cpu or cuda, got 'nonsense'"),
        (["--device", "meta"], "tune: --device: expected cpu or cuda, got 'meta'"),
        (["--device", "cuda:99"], "torch sees no such GPU"),
        (["--time", "0"], "tune: --time: expected seconds above 0, got 0"),
        (["--batch", "0"], "tune: --batch: expected at least 1, got 0"),
        (["--image", "0"], "tune: --image: expected at least 1, got 0"),
        (["--cache", "FILE/cache"], "FILE/cache: cannot be written to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    monkeypatch.setattr("resnet_fused.tuning.tune", lambda *a, **k: pytest.fail("measured"))
    assert main([*COMMAND, *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
