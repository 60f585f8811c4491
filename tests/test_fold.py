"""Folding for inference: the same numbers, never stale, nothing taken from the model, and an exact way back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import eager, explain, fold, folded, fuse, plan, unfold, unfuse
from resnet_fused.engines import cpu, cpu_plan
from resnet_fused.modules import Fused
from resnet_fused.numerics import assert_law

from .harness import LAYOUTS, randomise
from .test_equivalence import BLOCKS

X = torch.randn(2, 3, 15, 13, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    """Folded filters are for the library's convolutions: our own products apply the batch norm while they store."""
    with plan.force(plan.LIBRARY):
        yield


@pytest.mark.skipif(cpu.load() is not None or cpu_plan.isa() == "baseline", reason="needs the CPU library's products")
def test_our_own_products_need_no_folded_filters() -> None:
    torch.manual_seed(0)
    stock = randomise(eager.BasicBlock(32, 32)).eval()
    ours, x = fold(copy.deepcopy(stock)), torch.randn(2, 32, 28, 28)
    with torch.no_grad(), plan.force(None):
        made = ours(x)
        assert not kept_sites(ours) and made.equal(fuse(copy.deepcopy(stock))(x))
        with plan.force(plan.LIBRARY):
            ours(x)
            assert kept_sites(ours)
    with plan.force(None):
        hold_inference_to_law(stock, ours, x, torch.float32)


def net(**options: object) -> eager.ResNet:
    torch.manual_seed(0)
    stem = eager.StemConfig(8, 3, 1)
    made = eager.ResNet(eager.Bottleneck, [2, 1], 5, planes=[4, 6], stem=stem, **options)  # type: ignore[arg-type]
    return randomise(made).eval()  # type: ignore[return-value]


def kept_sites(model: nn.Module) -> list[folded.FoldedSite]:
    stores = [m.__dict__[folded.FOLDED] for m in model.modules() if folded.FOLDED in m.__dict__]
    return [made for store in stores for *_, made in store._sites.values()]


def hold_inference_to_law(stock: nn.Module, ours: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    with torch.no_grad():
        ref = copy.deepcopy(stock).double()(x.double())
        layouts = [x.contiguous(memory_format=layout) for layout in LAYOUTS.values()]
        outs = [copy.deepcopy(stock).to(memory_format=f)(y) for f, y in zip(LAYOUTS.values(), layouts, strict=True)]
        for y in layouts:
            got = ours(y)
            assert got.dtype == outs[0].dtype
            assert_law({"out": got}, {"out": ref}, [{"out": out} for out in outs], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, dtype: torch.dtype) -> None:
    make, channels = BLOCKS[name]
    torch.manual_seed(0)
    block = randomise(make()).eval().to(dtype)
    ours = fold(copy.deepcopy(block))
    hold_inference_to_law(block, ours, torch.randn(3, channels, 13, 11).to(dtype), dtype)
    assert kept_sites(ours)
    assert all(site.packed is (dtype != torch.float64) for site in kept_sites(ours))


@pytest.mark.parametrize("shape", [(1, 3, 9, 7), (4, 3, 1, 1), (0, 3, 8, 8)], ids=["batch-1", "one-pixel", "empty"])
def test_network(shape: tuple[int, ...]) -> None:
    stock = net()
    ours = fold(copy.deepcopy(stock))
    x = torch.randn(shape)
    if x.numel():
        hold_inference_to_law(stock, ours, x, torch.float32)
        assert len(kept_sites(ours)) == 1 + 3 * 3 + 2
    with torch.inference_mode():
        assert ours(x).argmax(1).equal(stock(x).argmax(1))


def test_autocast_folds_into_its_own_dtype() -> None:
    stock = net()
    ours = fold(copy.deepcopy(stock))
    with torch.autocast("cpu", torch.bfloat16):
        hold_inference_to_law(stock, ours, X, torch.bfloat16)
    assert {site.weight.dtype for site in kept_sites(ours)} == {torch.bfloat16}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_way_back_is_exact(fused: bool) -> None:
    model = fuse(net(), memory="lean") if fused else net()
    model.bn1.weight.requires_grad_(False)

    def state() -> list[object]:
        objects: list[object] = [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]
        return objects + [(n, id(p), p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()]

    before, values = state(), {k: v.clone() for k, v in model.state_dict().items()}
    assert fold(model) is model and any(isinstance(m, Fused) for m in model.modules())
    with torch.no_grad():
        model(X)
    assert [*model.state_dict()] == [*values]
    assert all("folded for inference" in record.reason for record in explain(model).blocks if record.kind != "stem")
    assert fold(model) is model
    assert unfold(model) is model and state() == before
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    unfold(fuse(fold(model)))
    assert isinstance(model.layer1[0], Fused)  # asked for after fold, so that it stays
    assert state() != before or fused
    unfuse(fold(model))
    assert not any(folded.FOLDED in m.__dict__ or isinstance(m, Fused) for m in model.modules())


def _sgd(model: nn.Module, kind: type[torch.optim.Optimizer], **options: object) -> None:
    optimizer = kind(model.parameters(), lr=0.5, **options)  # type: ignore[call-arg]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def _replace_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 2


def _through_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(2)


def _in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        for p in model.parameters():
            p.mul_(2)


def _train(model: nn.Module) -> None:
    model.train()
    model(X)
    model.eval()


def _other_parameter(model: nn.Module) -> None:
    model.layer1[0].bn2.weight = nn.Parameter(torch.full((4,), 3.0))


def _eps(model: nn.Module) -> None:
    model.layer1[0].bn2.eps = 0.5


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "sgd": lambda m: _sgd(m, torch.optim.SGD),
    "sgd-fused": lambda m: _sgd(m, torch.optim.SGD, fused=True),
    "adam-fused": lambda m: _sgd(m, torch.optim.Adam, fused=True),
    "running-mean": lambda m: m.layer1[1].bn3.running_mean.add_(1),
    "running-var": lambda m: m.layer2[0].downsample[1].running_var[1].fill_(9),
    "data-replaced": _replace_data,
    "data-written": _through_data,
    "inference-mode": _in_inference_mode,
    "a-training-step": _train,
    "parameter-replaced": _other_parameter,
    "eps": _eps,
    "half-and-back": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change: str) -> None:
    model = fold(net())
    with torch.no_grad():
        before = model(X)
    CHANGES[change](model)
    stock = unfold(copy.deepcopy(model))
    assert not any(isinstance(m, Fused) for m in stock.modules())
    hold_inference_to_law(stock, model, X, torch.float32)
    with torch.no_grad():
        assert not torch.equal(model(X), before)


def test_addresses_that_come_again_are_not_taken_for_old_ones() -> None:
    model = fold(net())
    with torch.no_grad():
        model(X)
        for _ in range(8):  # each makes an address free that the next may get
            model.conv1.weight.data = model.conv1.weight.data + 1
    hold_inference_to_law(unfold(copy.deepcopy(model)), model, X, torch.float32)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_gradients_are_those_of_the_model_itself(fused: bool) -> None:
    plain = net()
    model = fold(copy.deepcopy(plain))
    with torch.no_grad():
        model(X)
    for mode in (False, True):
        for m in (plain.train(mode), model.train(mode)):
            m.zero_grad()
            m.double()(X.double()).sum().backward()
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, msg=name)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


def test_without_gradients_to_record_the_folded_filters_run() -> None:
    model = fold(net().requires_grad_(False))
    assert not model(X).requires_grad and kept_sites(model)
    other = fold(net())
    assert other(X).requires_grad and not kept_sites(other)
    fixed = fold(net().requires_grad_(False))
    assert fixed(X.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e38], ids=str)
def test_non_finite_values_are_those_of_stock(value: float) -> None:
    stock = net()
    stock.bn1.weight.data.fill_(4.0)
    ours = fold(copy.deepcopy(stock))
    x = X.clone()
    x[1, 2, 3, 4] = value
    with torch.no_grad():
        want, got = stock(x), ours(x)
        assert got[0].isfinite().all() and torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        stock.layer1[0].conv2.weight[1, 1, 1, 1] = value
        ours.load_state_dict(stock.state_dict())
        assert torch.equal(ours(X).isnan(), stock(X).isnan())


def test_overflow_inside_a_block_is_seen() -> None:
    stock = net()
    with torch.no_grad():
        stock.layer1[0].conv1.weight.mul_(1e25)
        stock.layer1[0].conv2.weight.mul_(1e25)  # infinities of both signs, whose sum is NaN
        want, got = stock(X), fold(copy.deepcopy(stock))(X)
    assert want.isnan().any() and torch.equal(got.isnan(), want.isnan())


def test_sizes_are_measured_once_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    largest = folded.largest
    monkeypatch.setattr(folded, "largest", lambda x: measured.append(x) or largest(x))
    with torch.no_grad():
        fold(randomise(eager.ResNet(eager.BasicBlock, [2, 2], 5, planes=[4, 6])).eval())(X)
    assert len(measured) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = fold(net())
    with torch.no_grad():
        want = model(X)
        twin = copied(model)
        assert not kept_sites(twin)
        assert torch.equal(twin(X), want) and kept_sites(twin)
        model.conv1.weight.zero_()
        assert torch.equal(twin(X), want)
    assert not any(isinstance(m, Fused) for m in unfold(twin).modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_leaving_torch() -> None:
    stock, model = net(), fold(net())
    with torch.no_grad():
        want = stock(X)
        model(X)
        traced = torch.jit.trace(model, X)
        exported = torch.export.export(model, (X,)).module()
        stream = io.BytesIO()
        torch.save(model.state_dict(), stream)
        stream.seek(0)
        stock.load_state_dict(torch.load(stream, weights_only=True))
        for other in (traced, exported, stock):
            assert torch.equal(other(X), want)


def test_compiling() -> None:
    stock, model = net(), fold(net())
    model.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        hold_inference_to_law(stock, model, X, torch.float32)


def test_one_batch_norm_after_two_convolutions() -> None:
    stock = net()
    stock.layer1[1].bn2 = stock.layer1[1].bn1  # of one width; folded into each of them
    ours = copy.deepcopy(stock)
    try:
        fold(ours)
    except ValueError as error:
        pytest.fail(str(error))
    hold_inference_to_law(stock, ours, X, torch.float32)


def test_frozen_batch_norms() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="FrozenBatchNorm2d is torchvision's")
    stock = net(norm_layer=ops.FrozenBatchNorm2d)
    ours = fold(copy.deepcopy(stock))
    hold_inference_to_law(stock, ours, X, torch.float32)
    assert len(kept_sites(ours)) == 1 + 3 * 3 + 2


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.m = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.b(torch.relu(self.n(self.a(x)))))


def test_user_written_blocks_and_plain_pairs() -> None:
    stock = randomise(nn.Sequential(Mine(), nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))).eval()
    ours = fold(copy.deepcopy(stock))
    hold_inference_to_law(stock, ours, X, torch.float32)
    assert len(kept_sites(ours)) == 3


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"fold: model: expected a torch\.nn\.Module, got int"):
        fold(1)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"unfold: model: expected a torch\.nn\.Module, got int"):
        unfold(1)  # type: ignore[type-var]
    model = net()
    model.layer1[1].bn2.train()
    with pytest.raises(ValueError, match=r"expected eval mode, got training mode in 'layer1\.1\.bn2'.*call model.eval"):
        fold(model)
    with torch.inference_mode():
        inference = net()
    with pytest.raises(ValueError, match=r"got the inference tensor 'conv1\.weight'"):
        fold(inference)
    for nothing in (
        nn.Sequential(nn.Linear(3, 3)),
        net(norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
    ):
        with pytest.raises(ValueError, match="expected a block whose batch norms can be folded, got none"):
            fold(nothing)
        assert not any(isinstance(m, Fused) or folded.FOLDED in m.__dict__ for m in nothing.modules())


def test_a_hooked_block_is_left_alone() -> None:
    stock = net()
    fired: list[object] = []
    model = copy.deepcopy(stock)
    model.layer1[0].conv2.register_forward_hook(lambda *_: fired.append(0))
    with pytest.warns(UserWarning, match=r"not folded: layer1\.0: hook on conv2"):
        fold(model)
    with pytest.warns(UserWarning, match="runs unfused: hook on conv2"):
        hold_inference_to_law(stock, model, X, torch.float32)
    assert fired and len(kept_sites(model)) == 1 + 2 * 3 + 1
    model.layer1[1].bn1.register_forward_hook(lambda *_: fired.append(1))
    with pytest.warns(UserWarning, match="runs unfused: hook on bn1"), torch.no_grad():
        model(X)
    assert 1 in fired
    assert explain(model).blocks[1].reason == "hook on conv2"
