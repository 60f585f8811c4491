"""What a training run is made of: recipes, schedules, batches, data sets, models by name, progress."""

import gzip
import io

import pytest
import torch
from torch import nn

from resnet_fused.train import UserError, fashion
from resnet_fused.train import data as datasets
from resnet_fused.train.batches import Batches, crop_and_flip
from resnet_fused.train.models import build_model
from resnet_fused.train.progress import Progress
from resnet_fused.train.recipes import RECIPES, Recipe, Schedule


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
    assert build_model("tests.test_train:tiny", num_classes=4).fc.out_features == 4
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
