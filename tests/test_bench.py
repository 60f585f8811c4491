"""`resnet-fused bench`: proof before timing, what it writes, its order, its exit codes. Nothing here is timed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fused import nodes, site
from resnet_fused.benching import baselines, race, session
from resnet_fused.cli import main

MODEL = "tests.test_train:tiny"
COMMON = ["bench", "--batch", "4", "--image", "16", "--threads", "1", "--rounds", "6", "--warm-up", "1"]
TINY = [*COMMON, "--models", MODEL, "--baselines", "eager,nhwc"]
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


@pytest.fixture(autouse=True)
def in_a_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(name: str = "bench.json"):
    return json.loads(Path(name).read_text())


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_end_to_end(capsys):
    arguments = [*COMMON, "--models", "cifar-20", "--baselines", "eager,nhwc", "--mode", "train,infer"]
    assert main([*arguments, "--memory", "speed,min", "--out", "bench.json", "--plot", "bench.png"]) == 0
    assert Path("bench.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in Path().iterdir()) == ["bench.json", "bench.png"]
    document = written()
    assert document["format"] == "resnet_fused.bench" and document["interrupted"] is False
    assert {"processor", "cores", "threads", "engine"} <= set(document["machine"]) and document["date"]
    assert document["versions"]["torch"] == torch.__version__
    assert [(r["model"], r["mode"]) for r in document["results"]] == [("cifar-20", "train"), ("cifar-20", "infer")]
    train, infer = document["results"]
    assert all(proof["tensors"] > 50 and proof["reason"] is None for proof in train["proofs"])
    assert [row["name"] for row in train["contestants"]] == ["fused speed", "fused min", "eager", "nhwc"]
    for row in train["contestants"]:
        assert set(row["seconds"]) == {"step", "forward", "backward", "optimizer"}
        assert all(len(values) == 6 for values in row["seconds"].values())
        assert row["peak_bytes"] > row["kept_bytes"] > 0 and row["images_per_second"] > 0
        assert len(row["losses"]) == 6 + 1 + 1
    assert [set(row["seconds"]) for row in infer["contestants"]] == [{"step", "forward"}] * 4
    assert {pair["coverage"] for pair in train["comparisons"]} == {1 - 2 / 2**6}
    kept = {row["name"]: row["kept_bytes"] for row in train["contestants"]}
    assert kept["fused min"] < kept["fused speed"] < kept["eager"]
    assert set(train["losses"]["to_eager"]) == {"fused speed", "fused min", "nhwc"} and infer["losses"] is None
    out = capsys.readouterr().out
    for words in ("time, theirs / ours", "forward  backward  optimizer", "distance to eager NCHW", "peak MB"):
        assert words in out


def test_training_is_the_same_for_all(capsys):
    assert main([*TINY, "--out", "bench.json"]) == 0
    (result,) = written()["results"]
    first = {row["name"]: row["losses"][0] for row in result["contestants"]}
    wide = session.make_batches(session.Settings(batch=4, image=16), 3, 10, torch.contiguous_format)
    last = session.make_batches(session.Settings(batch=4, image=16), 3, 10, torch.channels_last)
    assert all(torch.equal(a, b) and torch.equal(i, j) for (a, i), (b, j) in zip(wide, last))
    assert len({f"{loss:.4f}" for loss in first.values()}) == 1
    assert all(row["losses"][0] != row["losses"][-1] for row in result["contestants"])


@pytest.mark.parametrize("losing", [0, 1])
def test_losing_rows_come_first(losing, capsys, monkeypatch):
    seconds = {"fused": 2.0, "eager": (4.0, 1.0)[losing], "nhwc": (1.0, 4.0)[losing]}

    def lap(self, name):
        return [seconds[name]] * self.rounds

    monkeypatch.setattr(race.Race, "seconds", lambda self, name, phase=None: lap(self, name))
    assert main(TINY) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("network"))
    assert "0.50x" in lines[start + 1] and "ours SLOWER" in lines[start + 1]
    assert "2.00x" in lines[start + 2] and "ours faster" in lines[start + 2]


def test_a_wrong_result_is_not_timed(capsys, monkeypatch):
    right = site.site_backward

    def wrong(*args):
        grads = right(*args)
        return grads._replace(weight=None if grads.weight is None else grads.weight * 1.01)

    monkeypatch.setattr(nodes, "site_backward", wrong)
    monkeypatch.setattr(race.Race, "round", lambda self: pytest.fail("timed"))
    assert main([*TINY, "--out", "bench.json"]) == 1
    out = capsys.readouterr().out
    assert f"{MODEL}: NOT TIMED: memory 'speed' is not right" in out and "FAIL grad of" in out
    assert written()["results"] == [] and written()["not_timed"][0]["model"] == MODEL


def test_ctrl_c_keeps_what_is_finished(capsys, monkeypatch):
    rounds = race.Race.round

    def interrupted(self):
        if self.rounds == 3 and len(self.laps) == 3 and done:
            raise KeyboardInterrupt
        rounds(self)
        if self.rounds == 6:
            done.append(self)

    done: list[race.Race] = []
    monkeypatch.setattr(race.Race, "round", interrupted)
    models = f"{MODEL},cifar-20,cifar-32"
    assert main([*TINY, "--models", models, "--image", "32", "--out", "bench.json"]) == 130
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert "cifar-20, train: interrupted after 3 of 6 rounds" in captured.out
    document = written()
    assert document["interrupted"] is True
    assert [(result["model"], result["rounds"]) for result in document["results"]] == [(MODEL, 6), ("cifar-20", 3)]


def test_a_baseline_that_fails_at_run_time_is_a_row_with_its_reason(capsys, monkeypatch):
    class Broken(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            raise RuntimeError("no C++ compiler\nand a long trace")

    broken = dataclasses.replace(baselines.BASELINES["compile"], build=Broken)
    monkeypatch.setitem(baselines.BASELINES, "compile", broken)
    assert main([*TINY, "--baselines", "eager,compile", "--out", "bench.json"]) == 0
    assert "compile channels_last: did not run: RuntimeError: no C++ compiler\n" in capsys.readouterr().out
    (result,) = written()["results"]
    assert [pair["against"] for pair in result["comparisons"]] == ["eager"]


def test_ours_failing_at_run_time_is_exit_code_1(capsys, monkeypatch):
    def refuse(model, memory):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(session, "fuse", refuse)
    assert main(TINY) == 1
    assert "fused: did not run: RuntimeError: out of registers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "resnet51"], "did you mean resnet50"),
        (["--models", "tests.test_bench:no_classifier"], "expected a classifier"),
        (["--baselines", "eager,jax"], "--baselines: expected some of eager,nhwc,compile"),
        (["--baselines", "apex"], "--baselines: apex: not installed"),
        (["--baselines", "inplace-abn"], "--baselines: inplace-abn: not installed"),
        (["--baselines", "compile-graphs"], "compile-graphs: CUDA graphs need --device cuda, got cpu"),
        (["--memory", "speed,huge"], "--memory: expected some of speed,lean,min"),
        (["--mode", "test"], "--mode: expected some of train,infer"),
        (["--device", "nonsense"], "--device: cannot use 'nonsense'"),
        (["--device", "meta"], "--device: expected cpu or cuda"),
        (["--dtype", "bf16", "--amp", "bf16"], "--amp bf16: expected --dtype fp32"),
        (["--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--batch", "1", "--image", "1"], "does not take images of shape (1, 3, 1, 1)"),
        (["--out", "nowhere/bench.json"], "--out nowhere/bench.json: cannot be written: there is no folder"),
        (["--out", "."], "--out .: expected a file, got a folder"),
        pytest.param(
            ["--plot", "nowhere/bench.png"],
            "--plot nowhere/bench.png: cannot be written",
            marks=pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed"),
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch):
    for library in ("apex", "apex.contrib.groupbn.batch_norm", "inplace_abn"):
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(session.Session, "run", lambda self: pytest.fail("measured"))
    assert main([*TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out


def no_classifier():
    return nn.Conv2d(3, 4, 3)


def test_no_gpu_here_is_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main([*TINY, "--device", "cuda"]) == 2
    assert "--device: cannot use 'cuda'" in capsys.readouterr().err


def test_a_dtype_that_does_not_run_is_one_line(capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("not implemented for 'Half'\ntrace")

    monkeypatch.setattr(torch, "conv2d", refuse)
    assert main([*TINY, "--dtype", "fp16"]) == 2
    assert "--dtype: torch.float16 does not run on cpu: not implemented for 'Half'\n" in capsys.readouterr().err


def test_plot_without_matplotlib_is_one_line(capsys, monkeypatch):
    from resnet_fused.cli import bench

    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main([*TINY, "--plot", "bench.png"]) == 2
    assert "--plot: matplotlib is not installed" in capsys.readouterr().err


def test_compile_that_would_run_eager_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert main([*TINY, "--baselines", "compile"]) == 2
    assert "TORCHDYNAMO_DISABLE is set" in capsys.readouterr().err


@pytest.mark.parametrize("precision", [["--dtype", "bf16"], ["--amp", "bf16"], ["--amp", "fp16"]], ids=" ".join)
def test_other_precisions(precision, capsys):
    assert main([*TINY, *precision, "--rounds", "1", "--out", "bench.json"]) == 0
    (result,) = written()["results"]
    assert all(row["failed"] is None for row in result["contestants"])
    assert {pair["verdict"] for pair in result["comparisons"]} == {"too few rounds to tell"}


def test_the_command_names_no_folder(tmp_path, capsys):
    assert main([*TINY, "--rounds", "1", "--out", str(tmp_path / "bench.json")]) == 0
    text = Path("bench.json").read_text()
    assert "--out bench.json" in text and str(tmp_path) not in text
