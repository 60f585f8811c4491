"""Surgery: what `fuse` changes, what it must not change, and the exact way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import eager_blocks as eager
from resnet_fused import explain, fuse, fused, unfuse
from resnet_fused.modules import Fused, FusedBlock, FusedStage, FusedTrunk
from resnet_fused.resnet import plain

from .harness import hold_to_law, randomise, step

X = torch.randn(2, 3, 33, 35, generator=torch.Generator().manual_seed(3))


def _small() -> nn.Module:
    torch.manual_seed(0)
    return resnet_fused.resnet18(num_classes=5, fused=False)


def _snapshot(model: nn.Module) -> list[object]:
    return [
        (name, type(m), sorted(m.__dict__), [id(p) for p in m.parameters(recurse=False)], list(m._modules))
        for name, m in model.named_modules()
    ]


def _same(got: dict[str, torch.Tensor], ref: dict[str, torch.Tensor]) -> None:
    assert got.keys() == ref.keys()
    for name in ref:
        torch.testing.assert_close(got[name], ref[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"])
def test_every_block_of_torchvision_is_fused(name: str) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an optional extra")
    model = fuse(getattr(torchvision.models, name)())
    blocks = [
        m
        for m in model.modules()
        if isinstance(m, (torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck))
    ]
    assert blocks and all(isinstance(b, FusedBlock) for b in blocks)
    assert isinstance(model, FusedTrunk) and isinstance(model, torchvision.models.ResNet)
    assert sum(isinstance(m, FusedStage) for m in model.modules()) == 4
    records = explain(model).blocks
    assert len(records) == len(blocks) + 1 and all(r.fused and r.reason and r.plan for r in records)


def test_unfuse_is_exact() -> None:
    model = _small()
    before, state = _snapshot(model), copy.deepcopy(model.state_dict())
    fuse(model)
    assert [id(p) for p in model.parameters()] == [i for row in before for i in row[3]]  # type: ignore[index]
    assert list(model.state_dict()) == list(state)
    unfuse(model)
    assert _snapshot(model) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_context_manager_restores_even_after_an_error() -> None:
    model = _small()
    before = _snapshot(model)
    with pytest.raises(RuntimeError, match="mine"), fused(model) as inside:
        assert inside is model and isinstance(model, FusedTrunk)
        raise RuntimeError("mine")
    assert _snapshot(model) == before
    fuse(model.layer1, memory="lean")
    partly = _snapshot(model)
    with fused(model):
        pass
    assert _snapshot(model) == partly
    assert "memory='lean'" in repr(model.layer1[0].__dict__["_resnet_fused"])


def test_fuse_twice_changes_the_mode_only() -> None:
    model = fuse(fuse(_small()), memory="min")
    assert {r.plan.memory for r in explain(model).blocks if r.plan} == {"min"}
    assert not any(isinstance(m, Fused) for m in unfuse(model).modules())


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_fused_and_equal(copier: str) -> None:
    model = fuse(_small())
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    _same(step(twin, X), step(model, X))


def test_state_dict_goes_both_ways() -> None:
    stock, model = _small(), fuse(_small())
    for source, target in ((stock, model), (model, stock)):
        result = target.load_state_dict(source.state_dict(), strict=True)
        assert not result.missing_keys and not result.unexpected_keys


def test_optimizer_made_before_fuse_stays_valid() -> None:
    model, twin = _small().double(), _small().double()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    fuse(model)
    for _ in range(2):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(X.double()).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_names_are_the_stock_ones() -> None:
    model = nn.Sequential(Mine(), Mine())
    name = str(type(model[0]))
    fuse(model)
    assert isinstance(model[0], FusedBlock) and str(type(model[0])) == name
    assert "FusedMine" in repr(model)
    assert isinstance(model[0:1], nn.Sequential)


@pytest.mark.parametrize("freeze", [False, True])
def test_frozen_batch_norm(freeze: bool) -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an optional extra")
    norm = torchvision.ops.FrozenBatchNorm2d if freeze else nn.BatchNorm2d
    block = randomise(eager.Bottleneck(16, 4, norm_layer=norm))
    for module in block.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
    model = hold_to_law(block, torch.randn(2, 16, 9, 7), torch.float32)
    assert explain(model).blocks[0].fused


class Mine(nn.Module):
    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wrong = wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.n(self.a(x)) + x
        return torch.sigmoid(z) if self.wrong else torch.relu(z)


def test_a_user_block_is_fused_and_another_is_left_alone_with_a_reason() -> None:
    model = fuse(nn.ModuleList([Mine(), Mine(wrong=True)]))
    first, second = explain(model).blocks
    assert first.fused and not second.fused
    assert "sigmoid" in second.reason
    hold_to_law(Mine(), torch.randn(2, 6, 7, 5), torch.float32)


def test_a_probe_that_fails_leaves_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["resnet_fused.fuse"], "probe", lambda *_: "output differs by 1")
    model = fuse(Mine())
    assert type(model) is Mine
    assert explain(model).blocks[0].reason == "output differs by 1"
    unfuse(model)
    assert not [key for key in model.__dict__ if key.startswith("_resnet_fused")]


def test_export_and_fx_see_the_plain_operators() -> None:
    model, x = fuse(_small()).double().eval(), X.double()
    want = model(x)
    exported = torch.export.export(model, (x,))
    assert not [n for n in exported.graph.nodes if "resnet_fused" in str(n.target)]
    for twin in (exported.module(), torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(twin(x), want)


def test_native_modules() -> None:
    block = resnet_fused.Bottleneck(16, 4, memory="lean")
    assert isinstance(block, eager.Bottleneck) and isinstance(block, FusedBlock)
    record = explain(block).blocks[0]
    assert record.fused and record.plan is not None and record.plan.memory == "lean"
    clone = pickle.loads(pickle.dumps(block))
    assert type(clone) is resnet_fused.Bottleneck
    assert type(unfuse(clone)) is eager.Bottleneck
    group_norm = resnet_fused.BasicBlock(4, 4, norm_layer=lambda c: nn.GroupNorm(2, c))
    assert group_norm(torch.randn(1, 4, 5, 5)).shape == (1, 4, 5, 5)
    assert not any(record.fused for record in explain(group_norm).blocks)


def test_nothing_to_fuse() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    assert fuse(model) is model
    assert "no block found" in str(explain(model))


def test_explain_prints_a_table() -> None:
    model = fuse(nn.Sequential(eager.BasicBlock(4, 4), Mine(wrong=True)))
    lines = repr(explain(model)).splitlines()
    assert lines[0] == "1/2 blocks fused"
    assert lines[2].split()[:3] == ["0", "BasicBlock", "cpu,"] or lines[2].split()[2] == "reference,"
    assert "as written" in lines[3] and "sigmoid" in lines[3]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fuse(3), TypeError, "fuse: model: expected a torch.nn.Module, got int"),
        (lambda: fuse(nn.ReLU(), memory="tiny"), ValueError, "fuse: memory: expected one of"),
        (lambda: fuse(nn.ReLU(), engine="tpu"), ValueError, "engine: expected one of"),
        (lambda: explain("x"), TypeError, "explain: model: expected a torch.nn.Module, got str"),
    ],
)
def test_bad_arguments(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


BAD_INPUTS = {
    "channels": torch.randn(2, 5, 8, 8),
    "rank-3": torch.randn(4, 8, 8),
    "rank-2": torch.randn(4, 8),
    "integer": torch.ones(2, 4, 8, 8, dtype=torch.int64),
    "half": torch.randn(2, 4, 8, 8).half(),
    "meta": torch.empty(2, 4, 8, 8, device="meta"),
    "one-value": torch.randn(1, 4, 1, 1),
    "none": None,
}


@pytest.mark.parametrize("what", BAD_INPUTS)
@pytest.mark.parametrize("memory", ["speed", "min"])
def test_bad_input_raises_what_the_stock_block_raises(what: str, memory: str) -> None:
    block = eager.BasicBlock(4, 4)
    with pytest.raises(Exception) as stock:
        copy.deepcopy(block)(BAD_INPUTS[what])
    with pytest.raises(type(stock.value)) as ours:
        fuse(copy.deepcopy(block), memory=memory)(BAD_INPUTS[what])
    assert str(ours.value).splitlines()[0] == str(stock.value).splitlines()[0]


def test_double_backward_is_a_clear_error() -> None:
    block = fuse(eager.BasicBlock(4, 4))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"use resnet_fused\.disable\(\)"):
        grad.sum().backward()


def test_stages_that_are_chains_are_blocks_of_a_trunk() -> None:
    model = fuse(plain(20))
    kinds = [type(module) for module in model.modules()]
    records = explain(model).blocks
    assert [(r.name, r.fused, r.plan and r.plan.extent) for r in records] == [
        (name, True, "trunk") for name in ("stem", "layer1", "layer2", "layer3")
    ]
    assert [type(module) for module in fuse(model).modules()] == kinds
