"""The training loop: recipes, batches, exact resume, checkpoints that survive a crash, comparison, memory."""

import dataclasses
import io
import json
import math
import os

import pytest
import torch
from torch import nn

from resnet_fused.resnet import cifar_resnet
from resnet_fused.train import Stop, TrainConfig, Trainer, UserError, checkpoint, compare, complete
from resnet_fused.train.history import History
from resnet_fused.train.lanes import FUSED, STOCK, YARDSTICK
from resnet_fused.train.memory import kept_for_backward
from resnet_fused.train.progress import Progress

TINY = "tests.test_train:tiny"
SMALL_RUN = TrainConfig(
    model=TINY, data="synthetic", image_size=8, batch_size=8, iterations=6, eval_every=3, checkpoint_every=2, threads=1
)


def tiny(num_classes=10, in_channels=3, fused=True):
    return cifar_resnet(8, num_classes=num_classes, in_channels=in_channels, fused=fused)


class StopAt(Stop):
    """A stop that comes while the given step runs."""

    def __init__(self, iteration):
        super().__init__()
        self.left = iteration

    def count(self, *_):
        self.left -= 1
        self.signal = 2 if self.left <= 0 else 0


def train(config, dataset, out, state=None, stop_after=None):
    trainer = Trainer(complete(config, dataset) if state is None else config, dataset, out, state)
    stop = Stop()
    progress = Progress(config.iterations, stream=io.StringIO())
    if stop_after is not None:
        stop = StopAt(stop_after)
        progress.update = stop.count
    done = trainer.run(progress, stop)
    trainer.metrics.close()
    return trainer, done


def events(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [{}, {"compare": True}, {"amp": "bf16"}, {"memory": "lean", "channels_last": False}],
    ids=["alone", "compare", "bf16", "lean-nchw"],
)
def test_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path, dataset, options):
    config = dataclasses.replace(SMALL_RUN, **options)
    whole, done = train(config, dataset, tmp_path / "whole")
    assert done
    _, done = train(config, dataset, tmp_path / "cut", stop_after=3)
    assert not done
    state = checkpoint.load(tmp_path / "cut")
    assert state["iteration"] == 3
    resumed, done = train(TrainConfig.from_dict(state["config"]), dataset, tmp_path / "cut", state)
    assert done
    assert resumed.history.losses == whole.history.losses
    assert resumed.history.evaluations == whole.history.evaluations
    assert resumed.schedule.state_dict() == whole.schedule.state_dict()
    for ours, theirs in zip(resumed.lanes, whole.lanes):
        for name, tensor in ours.model.state_dict().items():
            assert torch.equal(tensor, theirs.model.state_dict()[name]), name
    untimed = [
        [{k: v for k, v in event.items() if k != "images_per_second"} for event in events(tmp_path / name)]
        for name in ("whole", "cut")
    ]
    assert untimed[0] == untimed[1]


def test_resume_drops_the_metrics_after_the_checkpoint(tmp_path, dataset):
    train(SMALL_RUN, dataset, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "itera')
    state = checkpoint.load(tmp_path / checkpoint.PREVIOUS)
    assert state["iteration"] == 4
    train(TrainConfig.from_dict(state["config"]), dataset, tmp_path, state)
    assert [e["iteration"] for e in events(tmp_path) if e["event"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_resume_refuses_other_data(tmp_path, dataset):
    train(SMALL_RUN, dataset, tmp_path)
    other = dataclasses.replace(dataset, train_labels=dataset.train_labels.roll(1) * 0)
    state = checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="other data"):
        Trainer(TrainConfig.from_dict(state["config"]), other, tmp_path, state)


def test_settings_of_other_versions():
    """An older checkpoint lacks what came later; what is not known is refused by name."""
    old = {k: v for k, v in TrainConfig(seed=3).to_dict().items() if k not in ("validation", "sync_bn")}
    assert TrainConfig.from_dict(old) == TrainConfig(seed=3)
    with pytest.raises(UserError, match="this version does not know: colour"):
        TrainConfig.from_dict({**old, "colour": "red"})


def test_a_stock_model_loads_the_checkpoint(tmp_path, dataset):
    trainer, _ = train(SMALL_RUN, dataset, tmp_path)
    saved = torch.load(tmp_path / checkpoint.NAME, weights_only=True)["model"]
    stock = tiny(fused=False)
    stock.load_state_dict(saved, strict=True)
    assert torch.equal(stock.fc.weight, trainer.lanes[0].model.fc.weight)


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path, dataset, monkeypatch):
    train(SMALL_RUN, dataset, tmp_path)
    before = (tmp_path / checkpoint.NAME).read_bytes()

    def half_write(state, file):
        file.write(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half_write)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / checkpoint.NAME, {"iteration": 7})
    assert (tmp_path / checkpoint.NAME).read_bytes() == before
    assert not list(tmp_path.glob("*.new"))


def test_a_crash_before_the_rename_leaves_the_old_checkpoint(tmp_path, dataset, monkeypatch):
    train(SMALL_RUN, dataset, tmp_path)
    real = os.replace

    def crash(source, target):
        if os.path.basename(target) == checkpoint.NAME:
            raise OSError("power failure")
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(UserError, match="power failure"):
        checkpoint.save(tmp_path / checkpoint.NAME, {"iteration": 7})
    assert checkpoint.load(tmp_path)["iteration"] == 6
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["iteration"] == 6


def test_damaged_and_foreign_checkpoints(tmp_path, dataset):
    train(SMALL_RUN, dataset, tmp_path)
    good = (tmp_path / checkpoint.NAME).read_bytes()
    (tmp_path / checkpoint.NAME).write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=f"damaged.*{checkpoint.PREVIOUS}"):
        checkpoint.load(tmp_path)
    torch.save(tiny().state_dict(), tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"expected a checkpoint of .*conv1\.weight"):
        checkpoint.load(tmp_path / "foreign.pt")
    torch.save(nn.ReLU(), tmp_path / "pickle.pt")
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        checkpoint.load(tmp_path / "pickle.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nowhere.pt")


def test_lanes_start_equal_and_see_the_same_batches(tmp_path, dataset):
    config = dataclasses.replace(SMALL_RUN, compare=True, yardstick=True, iterations=2)
    trainer = Trainer(complete(config, dataset), dataset, tmp_path)
    assert [lane.name for lane in trainer.lanes] == [FUSED, STOCK, YARDSTICK]
    states = [lane.model.state_dict() for lane in trainer.lanes]
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, state[name]) for state in states), name
    assert type(trainer.lanes[0].model) is not type(trainer.lanes[1].model)
    seen = []
    for lane in trainer.lanes:
        lane.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer._step(Progress(2, stream=io.StringIO()))
    trainer.metrics.close()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].is_contiguous(memory_format=torch.contiguous_format)  # the yardstick's lane goes first, in NCHW
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


def test_compare_reports_everything(tmp_path, dataset):
    config = dataclasses.replace(SMALL_RUN, compare=True, iterations=10)
    trainer = Trainer(complete(config, dataset), dataset, tmp_path)
    trainer.run(Progress(10, stream=io.StringIO()), Stop())
    lines, picture = trainer.finish()
    trainer.close()
    text = "\n".join(lines)
    for words in (
        "test accuracy",
        "images/s",
        "ratio",
        "quartiles",
        "MB for backward",
        "loss, fused - stock",
    ):
        assert words in text
    if picture is not None:
        assert picture.read_bytes().startswith(b"\x89PNG")
    summary = events(tmp_path)[-1]
    assert summary["event"] == "summary"
    kept = summary["kept_for_backward_bytes"]
    assert 0 < kept[FUSED] < kept[STOCK]


def test_divergence_and_speed():
    parted = compare.divergence([1.0, 2.0, 3.0, 2.5], [1.0, 2.0, 3.5, 2.75])
    assert (parted.visible, parted.largest, parted.at) == (3, 0.5, 3)
    assert compare.divergence([math.nan], [1.0]).largest == math.inf
    assert compare.divergence([math.nan], [math.nan]).largest == 0
    timed = compare.speed([9.0] * 5 + [1.0] * 8, [9.0] * 5 + [2.0] * 8, batch_size=4)
    assert (timed.ours, timed.theirs, timed.ratio, timed.low, timed.high) == (4, 2, 2, 2, 2)
    assert compare.speed([1.0], [1.0], 4) is None


def test_divergence_is_described():
    history = History([FUSED, STOCK])
    history.losses = {FUSED: [1.0, 1.5], STOCK: [1.0, 1.25]}
    history.seconds = {FUSED: [1.0, 1.0], STOCK: [1.0, 1.0]}
    lines = compare.describe(compare.summarise(history, 2, {FUSED: 10, STOCK: 20}), 2)
    assert "largest 2.50e-01 at iteration 2" in lines[-1]


def test_kept_for_backward_counts_each_storage_once():
    x = torch.randn(2, 3, 4, 4)
    model = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.ReLU(), nn.Conv2d(5, 7, 1, bias=False))
    relu_out = 2 * 5 * 4 * 4 * 4  # saved by the ReLU and again by the second convolution; the input is not counted
    assert kept_for_backward(model, x) == relu_out
    batch_norm = nn.BatchNorm2d(3)
    before = batch_norm.running_mean.clone()
    kept_for_backward(batch_norm, x)
    assert torch.equal(batch_norm.running_mean, before)
