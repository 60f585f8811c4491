"""The command `make gpu` as far as it runs anywhere: without a GPU, and around the parts that need one."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import gpu
from resnet_fused.cli import check


def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert capsys.readouterr().out == "gpu: no GPU here: torch.cuda.is_available() is False\n"


@pytest.mark.parametrize("failing", [None, "check"])
def test_only_what_passed_is_timed_and_the_file_says_so(failing, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    timed = []
    document = {"machine": {"gpu": "NVIDIA Thing-1 80GB"}, "settings": {"rounds": 1}, "not_timed": [], "results": []}

    class Stub:
        interrupted = False

        def __init__(self, settings, say):
            assert settings.device == "cuda" and settings.dtype == "bf16"

        def run(self):
            timed.append(True)

        def document(self, command):
            return {**document, "command": command}

        def exit_code(self):
            return 0

    monkeypatch.setattr(gpu, "Session", Stub)
    names = {tuple(command): name for name, command in gpu.commands("bf16").items()}

    def run(command, check):
        return SimpleNamespace(returncode=int(names[tuple(command[2:])] == failing))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main() == (1 if failing else 0)
    found = json.loads((tmp_path / "gpu-nvidia-thing-1-80gb.json").read_text())
    assert found["passed"] == {name: name != failing for name in names.values()}
    assert found["command"] == "make gpu" and bool(timed) == (failing is None)
    assert ("FAILED" in capsys.readouterr().out) == bool(failing)


def test_the_commands_are_ones_that_exist():
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    for dtype in ("bf16", "fp32"):
        for command in gpu.commands(dtype).values():
            if command[:2] == ["resnet_fused", "check"]:
                assert parser.parse_args(command[2:]).device == "cuda"
