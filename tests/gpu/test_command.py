"""The command `make gpu` as far as it runs anywhere: without a GPU, and around the parts that need one."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import gpu
from benchmarks.race import Row
from resnet_fused.cli import check

ROW = Row("fused", 1.0, 0.9, 1.1, 1.0, 1.0, 1.0)


def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 2
    assert capsys.readouterr().out == "gpu: no GPU here: torch.cuda.is_available() is False\n"


@pytest.mark.parametrize("failing", [None, "check"])
def test_the_results_file_has_the_machine_and_only_times_what_passed(failing, monkeypatch, tmp_path, capsys):
    properties = SimpleNamespace(name="NVIDIA Thing-1 80GB", total_memory=1, multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "race", lambda network, dtype: [ROW])
    names = {tuple(command): name for name, command in gpu.commands("bf16").items()}

    def run(command, check):
        return SimpleNamespace(returncode=int(names[tuple(command[2:])] == failing))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.main() == (1 if failing else 0)
    found = json.loads((tmp_path / "gpu-nvidia-thing-1-80gb.json").read_text())
    assert found["passed"] == {name: name != failing for name in names.values()}
    assert found["machine"]["gpu"] == "NVIDIA Thing-1 80GB" and found["machine"]["dtype"] == "bf16"
    assert {"torch", "triton", "cuda", "date"} <= found["machine"].keys()
    assert set(found["training_step"]) == (set() if failing else set(gpu.NETWORKS))
    assert ("FAILED" in capsys.readouterr().out) == bool(failing)


def test_the_commands_are_ones_that_exist():
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    for dtype in ("bf16", "fp32"):
        for command in gpu.commands(dtype).values():
            if command[:2] == ["resnet_fused", "check"]:
                assert parser.parse_args(command[2:]).device == "cuda"
