"""The training loop: recipes, batches, exact resume, checkpoints that survive a crash, comparison, memory."""

import dataclasses
import gzip
import io
import json
import math
import os

import pytest
import torch
from torch import nn

from resnet_fused.resnet import cifar_resnet
from resnet_fused.train import Stop, TrainConfig, Trainer, UserError, checkpoint, compare, complete, fashion
from resnet_fused.train import data as datasets
from resnet_fused.train.batches import Batches, crop_and_flip
from resnet_fused.train.history import History
from resnet_fused.train.lanes import FUSED, STOCK, YARDSTICK
from resnet_fused.train.memory import kept_for_backward
from resnet_fused.train.models import build_model
from resnet_fused.train.progress import Progress
from resnet_fused.train.recipes import RECIPES, Recipe, Schedule

TINY = "tests.test_train:tiny"
SMALL_RUN = TrainConfig(
    model=TINY, data="synthetic", image_size=8, batch_size=8, iterations=6, eval_every=3, checkpoint_every=2, threads=1
)


def tiny(num_classes=10, in_channels=3, fused=True):
    return cifar_resnet(8, num_classes=num_classes, in_channels=in_channels, fused=fused)


@pytest.fixture(scope="module")
def dataset():
    whole = datasets.load("synthetic", image_size=8)
    return dataclasses.replace(whole, test_images=whole.test_images[:64], test_labels=whole.test_labels[:64])


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_sane(name):
    recipe = RECIPES[name]
    schedule = Schedule(recipe, recipe.lr, recipe.iterations)
    schedule.held = False
    rates = [schedule.lr(i) for i in range(0, recipe.iterations, max(1, recipe.iterations // 500))]
    assert min(rates) >= 0 and max(rates) <= recipe.lr
    assert rates[-1] <= recipe.lr / 50


def test_he2015_schedule_and_warmup_rule():
    schedule = Schedule(RECIPES["he2015-cifar"], 0.1, 64_000)
    got = [schedule.lr(i) for i in (0, 31_999, 32_000, 47_999, 48_000)]
    assert got == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    held = Schedule(RECIPES["he2015-cifar-110"], 0.1, 64_000)
    for _ in range(100):
        held.observe(0.85)
    assert held.lr(100) == 0.01
    again = Schedule(RECIPES["he2015-cifar-110"], 0.1, 64_000)
    again.load_state_dict(held.state_dict())
    while held.held:
        held.observe(0.5)
        again.observe(0.5)
    assert not again.held
    held.observe(1.0)
    assert held.lr(500) == 0.1


def test_linear_warmup_is_at_most_a_tenth():
    schedule = Schedule(Recipe("", 1, 1.0, 50, "cosine", warmup_iterations=100), 1.0, 50)
    assert [schedule.lr(i) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_batches_are_a_function_of_seed_and_iteration(dataset):
    def batches(seed):
        return Batches(dataset, 16, seed, True, 3, True)

    one, two = batches(0), batches(0)
    late = one.train(200)
    for iteration in (0, 1, 5):
        two.train(iteration)
    assert torch.equal(two.train(200)[0], late[0]) and torch.equal(two.train(200)[1], late[1])
    assert not torch.equal(batches(1).train(200)[1], late[1])
    assert late[0].is_contiguous(memory_format=torch.channels_last)
    per_epoch = one.per_epoch
    orders = []
    for epoch in (0, 1):
        for step in range(per_epoch):
            one.train(epoch * per_epoch + step)
        orders.append(one._order)
    assert torch.equal(orders[0].sort().values, torch.arange(len(dataset.train_labels)))
    assert not torch.equal(orders[0], orders[1])


def test_crop_and_flip_shows_windows_of_the_padded_image():
    images = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).repeat(40, 1, 1, 1)
    out = crop_and_flip(images, 1, True, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    windows = [padded[r : r + 5, c : c + 5] for r in range(3) for c in range(3)]
    known = {bytes(w.flatten().tolist()) for w in windows}
    mirrored = {bytes(w.flip(1).flatten().tolist()) for w in windows}
    seen = {bytes(image.flatten().tolist()) for image in out}
    assert seen <= known | mirrored and seen & known and seen & mirrored
    still = crop_and_flip(images, 1, False, torch.Generator().manual_seed(0))
    assert {bytes(image.flatten().tolist()) for image in still} <= known


def test_moments_are_those_of_the_pixels(dataset):
    mean, std = dataset.moments()
    pixels = dataset.train_images.double() / 255
    torch.testing.assert_close(mean.flatten().double(), pixels.mean((0, 2, 3)), check_dtype=False)
    torch.testing.assert_close(std.flatten().double(), pixels.std((0, 2, 3), correction=0), check_dtype=False)


def write_idx(path, sizes, values):
    header = bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)
    path.write_bytes(gzip.compress(header + bytes(values)))


def write_fashion(folder, count=20):
    folder.mkdir()
    for part in ("train", "t10k"):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", (count, 28, 28), [i % 251 for i in range(count * 784)])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", (count,), [i % 10 for i in range(count)])


def test_fashion_mnist_from_packed_files(tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="Fashion-MNIST is read by torchvision")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_fashion(tmp_path / "packed")
    found = datasets.load("fashion-mnist", str(tmp_path / "packed"))
    assert found.train_images.shape == (20, 1, 28, 28) and found.train_labels.tolist() == [*range(10)] * 2
    assert found.train_images[0, 0, 0, :4].tolist() == [0, 1, 2, 3]
    assert sorted(file.suffix for file in (tmp_path / "packed").iterdir()) == [".gz"] * 4


def test_fashion_mnist_from_debians_package(tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="Fashion-MNIST is read by torchvision")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_fashion(tmp_path / "package")
    monkeypatch.setattr(fashion, "package_dir", lambda: tmp_path / "package")
    root, source = fashion.find(download=False)
    assert root == tmp_path / "cache" / "resnet_fused" and "Debian" in source


def test_fashion_mnist_damaged_or_nowhere(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision", reason="Fashion-MNIST is read by torchvision")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion, "package_dir", lambda: None)
    write_fashion(tmp_path / "packed")
    write_idx(tmp_path / "packed" / "train-labels-idx1-ubyte.gz", (21,), range(20))
    with pytest.raises(UserError, match="not a whole IDX file"):
        datasets.load("fashion-mnist", str(tmp_path / "packed"))
    (tmp_path / "packed" / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError, match="cannot unpack"):
        datasets.load("fashion-mnist", str(tmp_path / "packed"))

    def refuse(self):
        raise RuntimeError("Error downloading\nno route to host")

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", refuse)
    with pytest.raises(UserError, match="no route to host"):
        datasets.load("fashion-mnist")


def test_auto_falls_back_to_digits_and_says_why(monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

    def refuse(*_):
        raise UserError("nothing here")

    monkeypatch.setattr(fashion, "find", refuse)
    found = datasets.load("auto")
    assert found.name == "digits" and "nothing here" in found.source and not found.flippable
    assert found.train_images.shape[1:] == (1, 16, 16) and len(found.train_labels) + len(found.test_labels) == 1797


def write_images(folder, classes, size=(10, 12)):
    pytest.importorskip("torchvision", reason="image folders are read by torchvision")
    image_module = pytest.importorskip("PIL.Image", reason="torchvision reads images by Pillow")
    for value, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            image_module.new("RGB", size, (40 * value + number,) * 3).save(folder / name / f"{number}.png")


def test_image_folder_splits_itself_or_is_split(tmp_path):
    write_images(tmp_path / "flat", ["cat", "dog"])
    found = datasets.load(f"folder:{tmp_path / 'flat'}", image_size=8)
    assert found.train_images.shape == (8, 3, 8, 8) and len(found.test_labels) == 2 and found.classes == 2
    for image, label in zip(found.train_images, found.train_labels):
        assert image.float().mean().div(40).round() == label
    write_images(tmp_path / "split" / "train", ["cat", "dog"])
    write_images(tmp_path / "split" / "val", ["cat", "dog"])
    found = datasets.load(f"folder:{tmp_path / 'split'}", image_size=8)
    assert len(found.train_labels) == len(found.test_labels) == 10
    (tmp_path / "flat" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"cannot decode .*0\.png"):
        datasets.load(f"folder:{tmp_path / 'flat'}", image_size=8)
    with pytest.raises(UserError, match="one folder of images per class"):
        datasets.load(f"folder:{tmp_path / 'flat' / 'dog'}")
    with pytest.raises(UserError, match="no such folder"):
        datasets.load(f"folder:{tmp_path / 'nowhere'}")


def test_models_by_name():
    assert build_model("cifar-20", num_classes=3, in_channels=1).conv1.in_channels == 1
    assert build_model(TINY, num_classes=4).fc.out_features == 4
    for bad, words in [
        ("resnet5", "did you mean resnet50"),
        ("tests.test_train:nothing", "has no function 'nothing'"),
        ("no_such_module:model", "No module named"),
        ("builtins:dict", "not a function that builds a model"),
        ("collections:Counter", "expected a torch.nn.Module, got Counter"),
    ]:
        with pytest.raises(UserError, match=words):
            build_model(bad)


def test_plain_progress_ends_with_a_line():
    stream = io.StringIO()
    with Progress(3, stream=stream) as progress:
        for done in (1, 2, 3):
            progress.update(done, "loss 1.0, 5 img/s")
    assert stream.getvalue().startswith("3/3  loss 1.0, 5 img/s  left 0:00")
