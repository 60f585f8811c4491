"""Layer responses: equal to what hooks on the stock model measure, free while training, and nothing touched."""

from __future__ import annotations

import copy
import csv
import functools
import gc
import io
import json
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import eager_blocks as eager
from resnet_fused import fuse, layer_responses, site, watch_responses
from resnet_fused.eager import ResNet, StemConfig
from resnet_fused.numerics import assert_law

from .harness import LAYOUTS, randomise, step
from .test_chain import _stage

TRUNK = functools.partial(ResNet, num_classes=5, planes=[8, 12], stem=StemConfig(8))
MODELS = {
    "trunk-bottleneck": lambda: TRUNK(eager.Bottleneck, [2, 1]),
    "trunk-plain": lambda: TRUNK(eager.PlainBlock, [1, 1], stem=StemConfig(8, 3, 1, pool=False)),
    "trunk-option-c": lambda: TRUNK(eager.BasicBlock, [1, 1], shortcut="C", bias=True),
    "stage-pad": lambda: _stage("pad"),
    "stage-no-bn": lambda: _stage("no-bn"),
    "block": lambda: eager.BasicBlock(8, 8),
    "conv-bn": lambda: nn.Sequential(eager.ConvBNReLU(8, 6, 3, relu=False)),
}
AMP = {"float32": (torch.float32, None), "float64": (torch.float64, None), "bf16": (torch.float32, torch.bfloat16)}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomise(MODELS[name]())
    return model, torch.randn(4, 3 if name.startswith("trunk") else 8, 9, 8)


def measured(model: nn.Module, batches: list[Tensor], amp: torch.dtype | None = None) -> dict[str, Tensor]:
    """The standard deviation of every batch norm's output over all batches, by hooks on a copy of the model."""
    model, seen = copy.deepcopy(model), {}

    def keep(name: str, out: Tensor) -> None:
        # A copy in any case: the ReLU that follows works in place.
        seen.setdefault(name, []).append(out.detach().to(torch.float64, copy=True).flatten())

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, out, name=name: keep(name, out))
    with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
        for x in batches:
            model(x)
    return {name: torch.cat(outputs).std(correction=0) for name, outputs in seen.items()}


def hold(responses: resnet_fused.LayerResponses, stock: nn.Module, batches: list[Tensor], dtype: str) -> None:
    """The responses against float64's, with the bound of what hooks measure on eager in both layouts."""
    width, amp = AMP[dtype]
    ref = measured(copy.deepcopy(stock).double(), [x.double() for x in batches])
    layouts = [
        measured(stock.to(memory_format=fmt), [x.contiguous(memory_format=fmt) for x in batches], amp)
        for fmt in LAYOUTS.values()
    ]
    got = {row.norm: torch.tensor(row.std, dtype=torch.float64) for row in responses}
    assert_law(got, ref, layouts, width if amp is None else amp)


@pytest.mark.parametrize(
    ("name", "memory", "engine"),
    [
        ("trunk-bottleneck", "speed", "cpu"),
        ("trunk-bottleneck", "lean", "cpu"),
        ("trunk-bottleneck", "min", "cpu"),
        ("trunk-bottleneck", "lean", "reference"),
        ("trunk-plain", "speed", "reference"),
        ("trunk-option-c", "min", "reference"),
        ("stage-pad", "speed", "cpu"),
        ("stage-no-bn", "min", "cpu"),
        ("block", "speed", "cpu"),
        ("conv-bn", "min", "cpu"),
    ],
)
def test_responses_are_what_hooks_measure(name: str, memory: str, engine: str) -> None:
    stock, x = make(name)
    fused = fuse(copy.deepcopy(stock), memory=memory, engine=engine)
    with watch_responses(fused) as watch:
        step(fused, x)
    for responses in (watch.latest(), layer_responses(fused, x)):
        hold(responses, stock, [x], "float32")
        assert {row.how for row in responses} == {"closed form"} and not responses.unseen


@pytest.mark.parametrize("dtype", ["float64", "bf16"])
@pytest.mark.parametrize("name", ["trunk-bottleneck", "stage-pad"])
def test_other_precisions(name: str, dtype: str) -> None:
    (stock, x), (width, amp) = make(name), AMP[dtype]
    stock, x = stock.to(width), x.to(width)
    fused = fuse(copy.deepcopy(stock))
    with watch_responses(fused) as watch:
        step(fused, x, autocast=amp)
    hold(watch.latest(), stock, [x], dtype)
    with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
        hold(layer_responses(stock, x), stock, [x], dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_batches_of_any_size_are_pooled(fused: bool, training: bool) -> None:
    stock, x = make("trunk-bottleneck")
    stock.train(training)
    batches = [x, 3 * x[:3], x[:0], x[1:2] - 1]
    responses = layer_responses(fuse(copy.deepcopy(stock)) if fused else stock, ((b, "labels") for b in batches))
    hold(responses, stock, batches, "float32")
    assert responses.batches == 4
    assert {row.how for row in responses} == {"closed form" if fused and training else "measured"}


def test_stock_and_fused_agree_in_names_and_order() -> None:
    stock, x = make("trunk-option-c")
    fused = fuse(copy.deepcopy(stock))
    expected = [
        "conv1",
        *(f"layer{i}.0.{name}" for i in (1, 2) for name in ("conv1", "conv2", "downsample.0")),
    ]
    assert list(layer_responses(stock, x).names) == list(layer_responses(fused, x).names) == expected
    threes = layer_responses(fused, (x, torch.arange(4)), kernel="3x3")
    assert list(threes.names) == [name for name in expected[1:] if "downsample" not in name]
    assert threes.names == layer_responses(stock, [x], kernel=3).names


def test_mixed_states_and_modules_say_how_they_were_seen() -> None:
    class ActiveNorm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    blocks = [eager.BasicBlock(8, 8) for _ in range(4)]
    stock = randomise(nn.Sequential(*blocks, nn.Conv2d(8, 8, 1), ActiveNorm(8), nn.Conv2d(8, 4, 3), nn.GroupNorm(2, 4)))
    stock[1].bn1.eval()
    x, calls = torch.randn(4, 8, 7, 7), []
    expected = measured(stock, [x])
    normalised = nn.functional.batch_norm(stock[:5](x), None, None, stock[5].weight, stock[5].bias, True)
    expected["5"] = normalised.std(correction=0)
    fused = fuse(copy.deepcopy(stock))
    fused[2].conv1.register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        responses = layer_responses(fused, x)
    how = {row.norm: row.how == "closed form" for row in responses}
    assert [name for name, closed in how.items() if not closed] == ["1.bn1", "2.bn1", "2.bn2", "5"]
    found = {row.norm: torch.tensor(row.std) for row in responses}
    torch.testing.assert_close(found, {name: value.float() for name, value in expected.items()})
    assert calls
    with pytest.warns(UserWarning, match="runs unfused: hook on conv1"):
        fused(x)
    with pytest.raises(ValueError, match="saw none"):
        layer_responses(stock[6:], x)


@pytest.mark.parametrize(("fused", "memory"), [(True, "speed"), (True, "min"), (False, "speed")])
def test_nothing_of_the_model_is_touched(fused: bool, memory: str) -> None:
    model, x = make("trunk-bottleneck")
    model = nn.Sequential(model, nn.Dropout(0.5))
    model[0].layer2.eval()
    model = fuse(model, memory=memory) if fused else model
    model(x).sum().backward()
    before = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()]))
    modes, generator = [m.training for m in model.modules()], torch.get_rng_state()
    state = [dict(m.__dict__) for m in model.modules()]
    layer_responses(model, (torch.randn(2, 3, 9, 8) for _ in range(2)))
    after = (model.state_dict(), [p.grad for p in model.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert modes == [m.training for m in model.modules()]
    assert state == [dict(m.__dict__) for m in model.modules()]
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize(
    ("memory", "amp"), [("speed", None), ("speed", torch.bfloat16), ("lean", None), ("min", torch.bfloat16)]
)
def test_training_is_bitwise_the_same_when_watched(memory: str, amp: torch.dtype | None) -> None:
    def train(model: nn.Module) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            found = step(model, x, autocast=amp)
            optimizer.step()
        return {**found, **model.state_dict()}

    stock, x = make("trunk-bottleneck")
    alone = train(fuse(copy.deepcopy(stock), memory=memory))
    model = fuse(copy.deepcopy(stock), memory=memory)
    with watch_responses(model, keep=5) as watch:
        watched = train(model)
    torch.testing.assert_close(watched, alone, rtol=0, atol=0)
    assert watch.forwards == len(watch.history()) == 2
    assert not site.is_observed()


def test_history_is_kept_and_pooled() -> None:
    stock, x = make("stage-pad")
    batches = [x, 2 * x[:2], x + 1]
    model = fuse(copy.deepcopy(stock))
    with watch_responses(model, keep=2) as watch, watch_responses(model) as other:
        for batch in batches:
            model(batch)
        fuse(copy.deepcopy(stock))(x)  # another model's sites are nobody's here
    assert watch.forwards == other.forwards == 3
    for responses, batch in zip(watch.history(), batches[1:]):
        hold(responses, stock, [batch], "float32")
    hold(watch.pooled(), stock, batches[1:], "float32")
    assert watch.latest() == watch.history()[-1] == other.latest()


def test_watching_keeps_no_activation() -> None:
    model, x = make("trunk-bottleneck")
    fuse(model)
    raw = []
    with site.observed(lambda _, __, outputs: raw.append(weakref.ref(outputs.y))), watch_responses(model) as watch:
        out = model(x)
        del out
        gc.collect()
        assert raw and not any(y() is not None for y in raw)
    assert sum(moments.untyped_storage().nbytes() for moments, _ in watch._kept[-1].values()) < 8_000


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forwards_count_once(reentrant: bool) -> None:
    stock, x = make("stage-pad")
    model = fuse(copy.deepcopy(stock))
    with watch_responses(model, keep=3) as watch:
        checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert watch.forwards == 1
    hold(watch.latest(), stock, [x], "float32")


def test_unfused_and_frozen_parts_are_listed_as_unseen() -> None:
    model = fuse(nn.Sequential(eager.BasicBlock(8, 8), eager.BasicBlock(8, 8), nn.BatchNorm2d(8)))
    model[1].bn2.eval()
    with watch_responses(model) as watch:
        model(torch.randn(2, 8, 5, 5))
    assert watch.latest().unseen == ("1.bn2", "2")
    assert "not seen: 1.bn2, 2" in str(watch.latest())


def test_sharded_like_weights_are_found_again() -> None:
    model = fuse(eager.BasicBlock(8, 8))
    with watch_responses(model) as watch:
        for _ in range(2):
            model.conv1.weight = nn.Parameter(model.conv1.weight.detach().clone())
            model(torch.randn(2, 8, 5, 5))
    assert watch.forwards == 2 and watch.latest().names == ("conv1", "conv2")


def test_compiled_models_say_that_they_are_not_watched() -> None:
    model, x = make("block")
    fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with watch_responses(model) as watch:
        compiled(x)
        with pytest.raises(RuntimeError, match="saw none; compiled and graphed models run without the observer"):
            watch.latest()
        assert watch.history() == []
    with pytest.raises(ValueError, match="got a compiled one"), watch_responses(compiled):
        pass
    assert layer_responses(compiled, x) == layer_responses(model, x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, x: watch_responses(3).__enter__(), TypeError, "model: expected a torch.nn.Module, got int"),
        (lambda m, x: watch_responses(m).__enter__(), ValueError, "expected fused blocks, got none; call fuse first"),
        (lambda m, x: watch_responses(m, 0).__enter__(), ValueError, "keep: expected at least 1 forward, got 0"),
        (lambda m, x: layer_responses(3, x), TypeError, "model: expected a torch.nn.Module, got int"),
        (lambda m, x: layer_responses(m, []), ValueError, "expected at least one batch, got none"),
        (lambda m, x: layer_responses(m, [{"x": x}]), TypeError, "expected images .* got dict"),
        (lambda m, x: layer_responses(m, [torch.arange(3)]), TypeError, "expected images .* got 1-D tensor"),
        (lambda m, x: layer_responses(m, x, kernel="big"), ValueError, "kernel: expected '3x3', .* got 'big'"),
    ],
)
def test_bad_input(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call(*make("block"))


def test_table_json_csv_and_order(tmp_path) -> None:
    model, x = make("trunk-option-c")
    responses = layer_responses(fuse(model), x)
    ranked = responses.sorted()
    assert list(ranked.std) == sorted(responses.std, reverse=True) and set(ranked.names) == set(responses.names)
    text = str(responses)
    assert "layer1.0.downsample.0" in text and "7 layers over 1 batch" in text
    assert json.loads(responses.to_json(tmp_path / "r.json"))["layers"][0]["std"] == responses.std[0]
    assert json.loads((tmp_path / "r.json").read_text())["layers"][0]["name"] == "conv1"
    lines = list(csv.DictReader(io.StringIO(responses.to_csv())))
    assert [float(line["std"]) for line in lines] == list(responses.std)
    assert lines[0]["kernel"] == "7x7" and len(list(responses)) == len(responses) == 7
