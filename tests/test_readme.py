"""The README's examples run: every Python block in a namespace of its own, every command through the command line."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch

from resnet_fused.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
FIRST_STEPS = README.partition("## First steps")[2].partition("\n## ")[0]
# A step's number, title, and its blocks of code.
STEPS = re.split(r"^\*\*(\d+)\. (.+?)\*\*", FIRST_STEPS, flags=re.M)[1:]
NEEDS = {"torchvision": "torchvision", "timm": "timm", "onnx": "onnxscript"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def test_there_are_twelve_first_steps() -> None:
    assert [int(n) for n in STEPS[::3]] == list(range(1, 13))


@pytest.mark.parametrize(("title", "text"), list(zip(STEPS[1::3], STEPS[2::3])), ids=STEPS[1::3])
def test_first_step(title: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own; a step that wants a package that is not here is skipped by that package's name."""
    for word, package in NEEDS.items():
        if f"import {word}" in text or f"{word}." in text:
            pytest.importorskip(package, reason=f"this step uses {package}")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    namespace: dict[str, object] = {"__name__": "readme"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for block in blocks(text, "python"):
            exec(compile(block, f"README, {title}", "exec"), namespace)
    for block in blocks(text, "console"):
        for line in block.splitlines():
            if line.startswith("$ resnet-fused "):
                assert main(shlex.split(line, comments=True)[2:]) == 0, line


def test_every_proof_of_the_table_exists() -> None:
    table = README.partition("## What works with the rest")[2].partition("\n## ")[0]
    proofs = re.findall(r"`(test_[a-z0-9_*]+)(?:::([a-z0-9_]+))?`", table)
    assert len(proofs) > 40
    for file, name in proofs:
        found = sorted(Path(__file__).parent.glob(f"{file}.py"))
        assert found, file
        assert any(f"def test_{name}" in path.read_text(encoding="utf-8") for path in found), f"{file}::{name}"


def test_the_front_example_runs() -> None:
    pytest.importorskip("torchvision", reason="the README's first example uses torchvision")
    (first, *_) = blocks(README.partition("## Two commands")[0], "python")
    exec(compile(first.replace("(8,", "(2,").replace("224", "64"), "README, first example", "exec"), {})
