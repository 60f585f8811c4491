"""The parts of a benchmark: intervals, turns, the GPU's clock, memory, and the libraries it is compared with."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from resnet_fused.benching import files, machine, memory, race, rivals, session, spread
from resnet_fused.benching.contest import Inference, TrainingStep
from resnet_fused.eager import BasicBlock, Stem, conv1x1
from resnet_fused.numerics import assert_law
from resnet_fused.resnet import cifar_resnet
from resnet_fused.train.errors import UserError


@pytest.mark.parametrize(
    ("count", "ranks"),
    [(1, (1, 1)), (2, (1, 2)), (5, (1, 5)), (6, (1, 6)), (8, (1, 8)), (9, (2, 8)), (11, (2, 10)), (21, (6, 16))],
)
def test_median_interval_has_the_ranks_of_the_tables(count, ranks):
    found = spread.median_interval(list(range(count, 0, -1)))
    assert (found.low, found.high) == ranks and found.median == (count + 1) / 2
    assert (found.coverage >= 0.95) == (count >= 6)


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [(2.0, "ours faster"), (0.5, "ours SLOWER"), (1.0, "no clear difference")],
)
def test_verdict(theirs, verdict):
    assert spread.compare("fused", "eager", [1.0] * 6, [theirs] * 6).verdict == verdict
    assert spread.compare("fused", "eager", [1.0] * 5, [theirs] * 5).verdict == "too few rounds to tell"


def test_ctrl_c_within_a_round_counts_for_nobody():
    def stop(mark):
        if turns.rounds == 2:
            raise KeyboardInterrupt

    turns = race.Race({"a": race.whole(lambda: None), "b": stop})
    with pytest.raises(KeyboardInterrupt):
        for _ in range(5):
            turns.round()
    assert {name: len(laps) for name, laps in turns.laps.items()} == {"a": 2, "b": 2}


def test_losses_are_compared_after_the_same_steps():
    rows = [{"name": "fused", "losses": [4.0, 3.0]}, {"name": "eager", "losses": [4.0, 2.5, 1.0]}]
    found = session.losses([*rows, {"name": "nhwc", "losses": [4.0, 2.75, 1.5]}, {"name": "compile"}])
    assert found == {
        "steps": 2,
        "last": {"fused": 3.0, "eager": 2.5, "nhwc": 2.75},
        "to_eager": {"fused": 0.5, "nhwc": 0.25},
        "between_eager_formats": 0.25,
    }
    assert session.losses(rows[:1])["to_eager"] == {} and session.losses([{"name": "fused"}]) is None


def test_the_starter_rotates():
    order: list[str] = []
    turns = race.Race({name: race.whole(lambda name=name: order.append(name)) for name in "abc"})
    for _ in range(3):
        turns.round()
    assert "".join(order) == "abcbcacab"


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        FakeEvent.now += 5.0
        self.at = FakeEvent.now

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def fake_gpu(monkeypatch):
    calls: list[str] = []
    properties = types.SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return calls


def test_gpu_clock_takes_events(fake_gpu):
    clock = race.DeviceClock(torch.device("cpu"))
    clock._flush.fill_(1)
    clock.start()
    assert fake_gpu == ["synchronize"] and not clock._flush.any()
    clock.mark("forward")
    clock.mark("backward")
    lap = clock.stop()
    assert fake_gpu == ["synchronize", "synchronize"]
    assert lap == race.Lap(0.015, {"forward": 0.005, "backward": 0.005})


def test_gpu_memory_is_what_stands_above_the_rest(fake_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: fake_gpu.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: fake_gpu.append("before") or 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: fake_gpu.append("after") or 350)
    assert memory._peak_of_gpu(lambda: fake_gpu.append("run"), torch.device("cpu")) == 250
    assert fake_gpu == ["synchronize", "reset", "before", "run", "synchronize", "after"]


def test_peak_memory_counts_what_stands_at_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            for _ in range(3):
                a, b = torch.empty(1 << 20), torch.empty(1 << 20)
                del a, b
            return x * self.weight

    found = memory.measure(Inference(Twice(), torch.ones(1, 1, 1, 1)))
    assert 8 << 20 <= found.peak < 9 << 20 and found.kept == 0


def test_without_the_profiler_the_peak_is_not_known(monkeypatch):
    monkeypatch.setattr(torch.profiler, "kineto_available", lambda: False)
    step = TrainingStep(cifar_resnet(8, fused=False), [(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))])
    found = memory.measure(step)
    assert found.peak is None and found.kept > 0 and len(step.losses) == 1


def test_memory_needs_no_step_of_its_own_numbers():
    model = cifar_resnet(8, fused=False)
    step = TrainingStep(model, [(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))])
    step.run()
    found = memory.measure(step)
    assert len(step.losses) == 2 and found.peak >= sum(p.numel() * 4 for p in model.parameters())


class FakeApexNorm(nn.BatchNorm2d):
    def __init__(self, num_features, fuse_relu=False):
        super().__init__(num_features)
        self.fuse_relu = fuse_relu

    def forward(self, x, z=None):
        assert x.is_contiguous() and (z is None or (self.fuse_relu and z.is_contiguous()))
        out = super().forward(x.permute(0, 3, 1, 2))
        out = out if z is None else out + z.permute(0, 3, 1, 2)
        return (out.relu() if self.fuse_relu else out).permute(0, 2, 3, 1)


class FakeInPlaceABN(nn.BatchNorm2d):
    def __init__(self, num_features, activation, activation_param):
        super().__init__(num_features)
        self.activation, self.slope = activation, activation_param

    def forward(self, x):
        out = super().forward(x)
        return nn.functional.leaky_relu(out, self.slope) if self.activation == "leaky_relu" else out


@pytest.fixture
def libraries(monkeypatch):
    for name in ("apex", "apex.contrib", "apex.contrib.groupbn"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("apex.contrib.groupbn.batch_norm")
    module.BatchNorm2d_NHWC = FakeApexNorm
    monkeypatch.setitem(sys.modules, "apex.contrib.groupbn.batch_norm", module)
    module = types.ModuleType("inplace_abn")
    module.InPlaceABN = FakeInPlaceABN
    monkeypatch.setitem(sys.modules, "inplace_abn", module)
    monkeypatch.setattr(rivals, "SLOPE", 0.0)  # a leaky ReLU that does not leak is stock's


def network(shortcut):
    torch.manual_seed(0)
    if shortcut == "stem":
        down = nn.Sequential(conv1x1(64, 128, 2), nn.BatchNorm2d(128))
        return nn.Sequential(Stem(), BasicBlock(64, 64), BasicBlock(64, 128, 2, down))
    return cifar_resnet(8, shortcut=shortcut, fused=False)


@pytest.mark.parametrize("shortcut", ["A", "B", "stem"])
@pytest.mark.parametrize("build", [rivals.with_apex, rivals.with_inplace_abn], ids=["apex", "inplace-abn"])
def test_rivals_compute_the_stock_network(libraries, build, shortcut):
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        eager = [network(shortcut).to(memory_format=f)(x) for f in (torch.contiguous_format, torch.channels_last)]
        ref = network(shortcut).double()(x.double())
        rival = build(network(shortcut).to(memory_format=torch.channels_last))
        assert not any(type(module) is nn.BatchNorm2d for module in rival.modules())
        got = rival(x.to(memory_format=torch.channels_last))
    assert_law({"output": got}, {"output": ref}, [{"output": out} for out in eager], torch.float32)


def test_a_library_races_like_any_other(libraries):
    settings = session.Settings(("tests.test_train:tiny",), ("inplace-abn",), batch=2, image=16, rounds=1, warm_up=1)
    found = session.Session(settings, say=lambda line: None)
    found.run()
    (result,) = found.results
    assert [row["failed"] for row in result["contestants"]] == [None, None] and len(result["comparisons"]) == 1
    assert result["losses"]["to_eager"] == {} and result["losses"]["between_eager_formats"] is None


def test_apex_takes_float16_on_a_gpu_alone(libraries):
    assert rivals.apex_obstacle(torch.device("cuda"), torch.float16) is None
    for device, kind in (("cuda", torch.bfloat16), ("cpu", torch.float16)):
        assert "needs --device cuda" in str(rivals.apex_obstacle(torch.device(device), kind))


def test_a_json_file_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    files.write_json(path, {"a": float("nan"), "b": [1.5, float("inf")]})
    assert path.read_text() == '{\n "a": null,\n "b": [\n  1.5,\n  null\n ]\n}\n'

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        files.write_json(path, {"c": 1})
    assert "1.5" in path.read_text() and [found.name for found in tmp_path.iterdir()] == ["bench.json"]


def test_a_command_line_without_paths():
    found = machine.without_paths(
        ["/some/where/pytest", "benchmarks/test_bench_models.py", "--json=/some/a.json", "-q"]
    )
    assert found == "pytest test_bench_models.py --json=a.json -q"
