"""Training on several processes: the run of one process, whatever the split; signals, resuming, and a lost rank."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from resnet_fused.numerics import assert_law
from resnet_fused.train import Trainer, UserError, checkpoint
from resnet_fused.train import ranks as processes
from resnet_fused.train.lanes import FUSED, STOCK, YARDSTICK
from tests import train_ranks_harness as harness
from tests.train_ranks_harness import RANKS, RUNS, UNEVEN

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def seen(folder):
    """What each rank of a gloo group saw of all runs."""
    harness.start(harness.one_rank, str(folder), [harness.free_port() for _ in range(4)])
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same runs on one process, those in float32 with stock in both memory formats."""
    out = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    both = dataclasses.replace(UNEVEN, yardstick=True)
    runs = {**RUNS, "uneven": both}
    return {name: harness.train(config, out / name) for name, config in runs.items()}


def tensors(run, lane):
    """A lane's end and its losses on the way."""
    state = {name.removeprefix("net."): tensor.double() for name, tensor in run["models"][lane].items()}
    return {**state, "losses": run["losses"][lane]}


def same(ours, theirs):
    for name in ("iteration", "evaluations", "lr", "scale"):
        assert ours[name] == theirs[name], name
    for lane, state in theirs["models"].items():
        assert torch.equal(ours["losses"][lane], theirs["losses"][lane])
        for name, tensor in state.items():
            assert torch.equal(ours["models"][lane][name], tensor), (lane, name)


@pytest.mark.parametrize("lane", [FUSED, STOCK])
@pytest.mark.parametrize("name", ["uneven", "two again", "one"])
def test_in_float32_a_split_batch_is_the_whole_one_by_the_law(seen, alone, name, lane):
    exact = tensors(alone["wide"], STOCK)
    eager = [tensors(alone["uneven"], other) for other in (STOCK, YARDSTICK)]
    assert_law(tensors(seen[0][name], lane), exact, eager, torch.float32)


@pytest.mark.parametrize("lane", [FUSED, STOCK])
@pytest.mark.parametrize("name", ["wide", "one image"])
def test_in_float64_a_split_batch_is_the_whole_one_far_below_float32(seen, alone, name, lane):
    exact = tensors(alone[name], STOCK)
    assert_law(tensors(seen[0][name], lane), exact, [exact], torch.float32)


def test_every_rank_holds_the_same_model_and_knows_the_same_curve(seen):
    for name in ("uneven", "wide", "one image", "cut", "two", "two again"):
        same(seen[1][name], seen[0][name])


def test_without_synchronised_norms_each_part_has_its_own_statistics(seen, tmp_path):
    config = RUNS["own statistics"]
    trainer = Trainer(harness.complete(config, harness.data()), harness.data(), tmp_path)
    lane, losses = trainer.lanes[0], []
    for iteration in range(config.iterations):
        images, labels = trainer.batches.train(iteration)
        lane.optimizer.zero_grad()
        lane.optimizer.param_groups[0]["lr"] = trainer.schedule.lr(iteration)
        losses.append(0.0)
        buffers = {}
        for rank in reversed(range(RANKS)):  # rank 0 last: its running statistics are kept
            before = {name: buffer.clone() for name, buffer in lane.model.named_buffers()}
            part = processes.Ranks(rank, RANKS).part(len(labels))
            loss = torch.nn.functional.cross_entropy(lane.model(images[part]), labels[part], reduction="sum")
            (loss / len(labels)).backward()
            losses[-1] += loss.item() / len(labels)
            buffers = {name: buffer.clone() for name, buffer in lane.model.named_buffers()}
            lane.model.load_state_dict(before, strict=False)
        lane.model.load_state_dict(buffers, strict=False)
        lane.optimizer.step()
    trainer.close()
    run = {"models": {FUSED: lane.model.state_dict()}, "losses": {FUSED: torch.tensor(losses, dtype=torch.float64)}}
    exact = tensors(run, FUSED)
    assert_law(tensors(seen[0]["own statistics"], FUSED), exact, [exact], torch.float32)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(seen):
    assert [one["cut"]["iteration"] for one in seen] == [2] * RANKS
    assert [one["cut"]["signal"] for one in seen] == [signal.SIGINT] * RANKS


def test_resumed_on_as_many_ranks_it_is_the_uninterrupted_run_bit_for_bit(seen):
    same(seen[0]["two"], seen[0]["uneven"])


@pytest.mark.parametrize("name", ["uneven", "own statistics"])
def test_evaluation_does_not_depend_on_the_number_of_ranks(seen, folder, name):
    """The end of a run on two ranks, evaluated by one process."""
    state = checkpoint.load(folder / name)
    dataset = harness.data()
    trainer = Trainer(harness.TrainConfig.from_dict(state["config"]), dataset, folder / "evaluated", state)
    trainer.close()
    assert trainer.batches.test_count == len(list(trainer.batches.test())) > 1
    last = seen[0][name]["evaluations"][-1]
    for lane in trainer.lanes:
        assert lane.evaluate(trainer.batches) == (last["accuracy"][lane.name], last["loss"][lane.name])


def test_a_checkpoint_does_not_say_how_many_ranks_wrote_it(folder, seen, tmp_path):
    ours = checkpoint.load(folder / "uneven")
    harness.train(UNEVEN, tmp_path)
    theirs = checkpoint.load(tmp_path)
    assert ours["config"] == theirs["config"]
    assert ours["model"].keys() == theirs["model"].keys()
    assert not any(name.startswith("module.") for name in ours["model"])


def test_only_rank_0_writes(folder, seen):
    """The other rank was given a folder of its own."""
    assert not (folder / "of another rank").exists()
    written = {file.name for file in (folder / "uneven").iterdir()}
    assert written == {checkpoint.NAME, checkpoint.PREVIOUS, "metrics.jsonl"}


def test_no_ratio_of_speeds_to_a_stand_in(seen, folder):
    summary = json.loads((folder / "compared" / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["event"] == "summary" and summary["speed"] is None and summary["divergence"]
    assert 0 < summary["kept_for_backward_bytes"][FUSED] <= summary["kept_for_backward_bytes"][STOCK]
    code, said, _ = seen[0]["compared"]
    assert code == 0 and "the same in plain PyTorch stands in" in said and "quartiles" not in said


def test_an_error_of_one_rank_is_heard_on_all(seen):
    heard = [one["refusals"] for one in seen]
    elsewhere = "FailedElsewhereError: train: failed on rank"
    assert [one["rank 1"] for one in heard] == [f"{elsewhere} 1: no such thing on 1", "UserError: no such thing on 1"]
    assert [one["later machine"] for one in heard] == [one["rank 1"] for one in heard]
    assert [one["rank 0"] for one in heard] == [
        "OSError: no such thing on 0",
        f"{elsewhere} 0: OSError: no such thing on 0",
    ]
    assert [one["none"] for one in heard] == ["fine"] * RANKS


def test_what_ranks_agree_on(seen):
    heard = [one["refusals"] for one in seen]
    assert [one["sums"] for one in heard] == [[2.0, 1.0]] * RANKS
    assert [one["signal"] for one in heard] == [15] * RANKS
    for count, parts in zip(harness.COUNTS, zip(*(one["parts"] for one in heard))):
        assert [index for part in parts for index in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_does_not_start(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    refused = [
        ("cpu", 60, r"RANK: .*expected a number as torchrun sets it, got None"),
        ("cpu", 0, r"expected a positive"),
    ]
    for device, timeout, words in refused:
        with pytest.raises(UserError, match=words), processes.joined(device, timeout):
            pass
    for name, value in harness.environment(0, 1).items():
        monkeypatch.setenv(name, value)
    words = "expected cpu or cuda, as every rank takes a GPU of its own; got 'cuda:1'"
    with pytest.raises(UserError, match=words), processes.joined("cuda:1"):
        pass


def test_a_bad_path_ends_all_ranks_with_one_message(seen):
    (code, _, said), (other, out, quiet) = [one["bad path"] for one in seen]
    assert code == other == UserError.exit_code
    assert "there is no such folder" in said and out == quiet == ""


def test_an_interrupted_command_saves_once_and_says_how_to_go_on(seen, folder):
    (code, said, _), (other, quiet, _) = [one["interrupted"] for one in seen]
    assert code == other == 128 + signal.SIGINT
    assert quiet == "" and re.search(r"stopped after \d+ of 100000 iterations, saved ", said)
    assert f"to go on: torchrun ... -m resnet_fused train --resume {folder / 'endless'}" in said


def launch(*flags):
    """Two ranks of the command, as torchrun starts them but without its supervision."""
    port = harness.free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "resnet_fused", "train", "--model", "tests.test_train:tiny", *flags],
            env={**os.environ, **harness.environment(rank, port)}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(RANKS)
    ]  # fmt: skip


def wait_for(condition, started, seconds=200):
    until = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in started), [process.communicate() for process in started]
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)


def test_a_killed_rank_ends_the_others_and_the_checkpoint_is_whole(seen, folder, tmp_path):
    out = folder / "endless"
    reached = checkpoint.load(out)["iteration"]
    started = launch(*harness.ENDLESS, "--out", str(out))  # goes on where it was interrupted
    wait_for(lambda: checkpoint.load(out)["iteration"] > reached, started)
    os.kill(started[1].pid, signal.SIGKILL)
    began = time.monotonic()
    _, said = started[0].communicate(timeout=90)
    assert time.monotonic() - began < 90, "gloo tells at once that a connection is closed"
    assert started[0].returncode == 1 and started[1].wait() == -signal.SIGKILL
    assert f"rank 0: lost rank 1 (process {started[1].pid} on " in said
    assert f"to go on: torchrun ... -m resnet_fused train --resume {out}" in said
    state = checkpoint.load(out)
    assert state["iteration"] > reached and state["iteration"] % 5 == 0
    assert harness.go_on(out, tmp_path, stop_after=1)["iteration"] == state["iteration"] + 1


def test_resume_auto_goes_on_with_the_settings_of_the_run_only(seen, folder):
    same_run = (*harness.ENDLESS, "--out", str(folder / "endless"))
    for flags, words in [
        (["--batch-size", "8", "--lr", "0.5"], "it does not go with --batch-size, --lr"),
        (["--epochs", "1"], "it does not go with --epochs"),
        (["--data", "digits"], "it does not go with --data"),
    ]:
        code, _, said = harness.command(*same_run, *flags)
        assert code == UserError.exit_code and words in said
    code, _, said = harness.command("--resume", "auto")
    assert code == UserError.exit_code and "--resume auto: expected --out too" in said


@pytest.mark.full
def test_three_ranks_resume_bit_for_bit_and_hold_the_law(tmp_path):
    """Sums of three terms depend on their order, which must not depend on where a gradient lies in a bucket."""
    harness.start(harness.three, str(tmp_path), harness.free_port(), size=3)
    seen = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for rank in range(3):
        same(seen[rank]["gone on"], seen[0]["whole"])
        same(seen[rank]["fp16"], seen[0]["fp16"])
    exact = harness.train(harness.EIGHT, tmp_path / "alone")
    for lane in (FUSED, STOCK):
        ref = tensors(exact, STOCK)
        assert_law(tensors(seen[0]["wide"], lane), ref, [ref], torch.float32)


@pytest.mark.full
def test_torchrun_restarts_after_a_killed_rank_and_the_run_goes_on(tmp_path):
    out = tmp_path / "run"
    flags = ("--data", "synthetic", "--image-size", "8", "--batch-size", "9", "--iterations", "400")
    flags += ("--checkpoint-every", "5", "--eval-every", "400", "--out", str(out), "--resume", "auto")
    command = ("-m", "resnet_fused", "train", "--model", "tests.test_train:tiny", *flags)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    started = subprocess.Popen(
        [*launcher, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for((out / checkpoint.NAME).exists, [started])
    os.kill(worker_of(started.pid), signal.SIGKILL)
    said, _ = started.communicate(timeout=400)
    assert started.returncode == 0, said
    assert "lost rank" in said and checkpoint.load(out)["iteration"] == 400


def worker_of(pid):
    """A process that torchrun started as local rank 1."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    environments = {int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children}
    return next(child for child, variables in environments.items() if b"LOCAL_RANK=1" in variables)
