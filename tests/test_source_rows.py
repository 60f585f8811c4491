"""The source architectures, row by row: each works fused with the same numbers.

A test's name or id begins with the row, so that ``-k A1`` runs all there is for it; `test_source_rows_cd` has what else
there is to the later rows, `test_source_bugs` the rows whose text fails.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from contextlib import redirect_stdout

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import explain, fuse, unfuse
from resnet_fused.modules import Fused, FusedBlock
from resnet_fused.recognise import recognise
from resnet_fused.resnet import from_stages

from .harness import Outcome, hold_to_law, randomise, step
from .models import literal, source_a, source_b
from .models.rows import IMAGE, MAP, REPEATS, ROWS
from .test_sources import count, on_meta

STEPS = 2


def train_then_eval(model: nn.Module, x: Tensor, dout: Tensor | None = None, autocast: object = None) -> Outcome:
    """Two training steps whose gradients add up, then one in eval mode on the statistics that these have moved.

    The weights stay: two programs that are both right drift apart by rounding, and more with every step of SGD.
    """
    seen: Outcome = {}
    for i in range(STEPS):
        seen |= {f"{name} of step {i}": value for name, value in step(model, x.roll(i, 0), dout).items()}
    model.zero_grad()
    seen |= {f"{name} in eval": value for name, value in step(model.eval(), x, dout).items()}
    return seen | {"output": seen["output in eval"]}


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse without the probe, whose float64 convolutions take seconds in a net of full width."""
    monkeypatch.setattr(sys.modules["resnet_fused.fuse"], "probe", lambda *_: None)


@pytest.mark.parametrize("row", [pytest.param(r, marks=pytest.mark.full if r in REPEATS else ()) for r in ROWS])
def test_row_has_the_same_numbers(row: str) -> None:
    build, shape = ROWS[row]
    fused = hold_to_law(randomise(build()), torch.randn(shape), torch.float32, run=train_then_eval)
    unfused = {record.name: record.reason for record in explain(fused).blocks if not record.fused}
    assert not {name for name, reason in unfused.items() if "not part of a conv-BN-ReLU chain" not in reason}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a1_bias_before_a_batch_norm(training: bool) -> None:
    """It shifts the running mean, its gradient is zero and not None; in eval it matters."""
    block = fuse(randomise(source_a.ResidualBlock(8, 8, 1)).train(training))
    shifted = copy.deepcopy(block)
    with torch.no_grad():
        shifted.conv1.bias += 1.0
    x = torch.randn(MAP)
    first, second = step(block, x), step(shifted, x)
    assert_same = torch.testing.assert_close
    assert "conv1.bias" in block.state_dict()
    if training:
        assert not first["conv1.bias.grad"].any()
        assert_same(second["output"], first["output"])
        assert_same(second["bn1.running_mean"] - first["bn1.running_mean"], torch.full((8,), block.bn1.momentum))
    else:
        assert first["conv1.bias.grad"].all() and not torch.allclose(second["output"], first["output"])


@pytest.mark.parametrize(("block", "dtype"), [(source_a.ResidualBlock(8, 8, 1), torch.float32), (source_b.ResidualBlock(8, 8), torch.bfloat16)], ids=["A2-outplace", "B1-inplace"])  # fmt: skip  # noqa: E501
def test_a2_the_add_decides_the_dtype_under_autocast(block: nn.Module, dtype: torch.dtype) -> None:
    x = torch.randn(MAP)
    fused = hold_to_law(randomise(block), x, torch.bfloat16, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == block(x).dtype == dtype


def test_a3_a4_both_spellings_load() -> None:
    """One block's tensors under the other's names: the same numbers, and both are fused."""
    renamed, block = fuse(literal.RenamedResidualBlock(8, 16, 2)), fuse(source_a.ResidualBlock(8, 16, 2))
    names = literal.RenamedResidualBlock.names
    state = {".".join(names.get(part, part) for part in key.split(".")): v for key, v in renamed.state_dict().items()}
    block.load_state_dict(state, strict=True)
    assert isinstance(renamed, FusedBlock) and isinstance(block, FusedBlock)
    x = torch.randn(MAP)
    assert torch.equal(renamed(x), block(x))


def test_a3_the_shortcut_runs_first_for_hooks() -> None:
    block, calls = fuse(source_a.ResidualBlock(8, 16, 2)), []
    for name in ("conv1", "shortcut.bn", "bn2"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with pytest.warns(UserWarning, match="hook on"):
        block(torch.randn(MAP))
    assert calls == ["shortcut.bn", "conv1", "bn2"]


@pytest.mark.parametrize(("name", "calls"), [("act1", 1), ("act2", 1)])
def test_a5_separate_activations_each_fire_once(name: str, calls: int) -> None:
    assert hook_calls(source_a.ResidualBlock(8, 8, 1), name) == calls


@pytest.mark.parametrize("widths", [{}, {"bottlenecks": [8, 16, 16]}, {"bottleneck": [8, 16, 16]}])
@pytest.mark.parametrize(("rule", "side"), [("labml", 8), ("paper", 4)])
def test_a7_a8_builder(widths: dict[str, list[int]], rule: str, side: int) -> None:
    """Both names of the widths, both rules of the strides, and the fused builder is the plain one."""
    options = {"stem_kernel": 3, "stride_rule": rule, **widths}
    net, plain = (from_stages([1, 1, 1], [16, 32, 64], fused=fused, **options) for fused in (True, False))
    plain.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), plain(x))
    sizes = []
    net.layer3.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape)))
    net(x)
    assert sizes == [(2, 64, side, side)]


def test_a10_child_of_a_sequential() -> None:
    build, shape = ROWS["A10"]
    model = build()
    fuse(model[0])
    assert sum(isinstance(m, FusedBlock) for m in model.modules()) == 3
    assert model[0](torch.randn(shape)).shape == (4, 16) and model(torch.randn(shape)).shape == (4, 10)


@pytest.mark.parametrize(
    ("config", "rule", "parameters"),
    [
        (([3, 3, 3], [16, 32, 64]), "labml", 272_912),
        (([3, 3, 3], [16, 32, 64]), "paper", 272_608),
        (([6, 6, 6], [16, 32, 64], [8, 16, 16]), "labml", 57_392),
        (([6, 6, 6], [16, 32, 64], [8, 16, 16]), "paper", 57_088),
    ],
)
def test_a11_counts_do_not_change(config: tuple[list[int], ...], rule: str, parameters: int) -> None:
    model = fuse(on_meta(source_a.ResNetBase, *config, first_kernel_size=3, stride_rule=rule))
    assert count(model) == parameters
    assert sum(isinstance(m, FusedBlock) for m in model.modules()) == sum(config[0])


def hook_calls(block: nn.Module, name: str) -> int:
    """How often a hook on a module of the fused block fires in one forward, where that is as often as in stock."""
    counts = []
    for model in (copy.deepcopy(block), fuse(block)):
        calls: list[int] = []
        model.get_submodule(name).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with pytest.warns(UserWarning, match=f"hook on {name}") if isinstance(model, Fused) else io.StringIO():
            model(torch.randn(MAP))
        counts.append(len(calls))
    assert counts[0] == counts[1]
    return counts[0]


@pytest.mark.parametrize(("block", "calls"), [(source_b.ResidualBlock, 2), (source_b.BottleneckBlock, 3)])
def test_b1_hooks_on_the_shared_relu(block: Callable[..., nn.Module], calls: int) -> None:
    assert hook_calls(block(8, 8 // block.expansion), "relu") == calls


def test_b2_empty_sequential_is_the_identity() -> None:
    block = fuse(source_b.BottleneckBlock(16, 4))
    assert isinstance(block, FusedBlock) and recognise(block).shortcut.kind == "identity"
    assert next(iter(fuse(source_b.BottleneckBlock(8, 4)).shortcut.state_dict())) == "0.weight"


@pytest.mark.parametrize(
    ("depth", "parameters", "entries"),
    [
        (18, 11_168_832, 120),
        (50, 23_500_352, 318),
        pytest.param(101, 42_492_480, 624, marks=pytest.mark.full),
        pytest.param(152, 58_136_128, 930, marks=pytest.mark.full),
    ],
)
def test_b4_headless_counts_and_keys(depth: int, parameters: int, entries: int, unproven: None) -> None:
    """Fused, the keys are torchvision's but for the shortcut's name, the first convolution's sides and the head."""
    model = fuse(on_meta(getattr(source_b, f"resnet{depth}")))
    state = model.state_dict()
    assert (count(model), len(state)) == (parameters, entries)
    ours = on_meta(getattr(resnet_fused, f"resnet{depth}"), fused=False).state_dict()
    renamed = {key.replace("shortcut", "downsample"): value.shape for key, value in state.items()}
    assert set(ours) - set(renamed) == {"fc.weight", "fc.bias"} and not set(renamed) - set(ours)
    assert {key for key in renamed if ours[key].shape != renamed[key]} == {"conv1.weight"}


@pytest.mark.parametrize("block", [source_b.ResidualBlock, source_b.BottleneckBlock])
def test_b5_zero_init_before_or_after_fuse(block: type[nn.Module]) -> None:
    """The source's loop finds its blocks by isinstance, fused or not."""
    last = "bn3" if block is source_b.BottleneckBlock else "bn2"
    torch.manual_seed(0)
    before = fuse(source_b.ResNet(block, (1, 1, 1, 1), zero_init_residual=True, width=8))
    torch.manual_seed(0)
    after = fuse(source_b.ResNet(block, (1, 1, 1, 1), width=8))
    for module in after.modules():
        if isinstance(module, block):
            nn.init.zeros_(getattr(module, last).weight)
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    assert sum(isinstance(m, block) and isinstance(m, FusedBlock) for m in before.modules()) == 4


def summary_by_hooks(model: nn.Module, shape: tuple[int, ...]) -> list[tuple[str, torch.Size, int]]:
    """What a summary prints of every module but containers and the model: its class, output shape and parameters."""
    rows: list[tuple[str, torch.Size, int]] = []

    def note(module: nn.Module, _: object, out: Tensor) -> None:
        rows.append((f"{type(module).__name__}-{len(rows) + 1}", out.shape, count(module)))

    watched = [m for m in model.modules() if not isinstance(m, nn.Sequential) and m is not model]
    handles = [module.register_forward_hook(note) for module in watched]
    model(torch.randn(2, *shape))
    for handle in handles:
        handle.remove()
    return rows


def summary_printed(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """What torchsummary prints."""
    torchsummary = pytest.importorskip("torchsummary", reason="the printed table is torchsummary's")
    with redirect_stdout(io.StringIO()) as out:
        torchsummary.summary(model, shape, device="cpu")
    return [line.split()[0] for line in out.getvalue().splitlines() if "-" in line] + out.getvalue().splitlines()


@pytest.mark.filterwarnings("ignore:resnet_fused. a .* runs unfused. hook on")
@pytest.mark.parametrize("summary", [summary_by_hooks, summary_printed])
def test_b6_a_summary_has_the_same_rows(summary: Callable[..., list[object]], unproven: None) -> None:
    stock, model = (source_b.ResNet(source_b.BottleneckBlock, (1, 1, 1, 1), width=8) for _ in range(2))
    rows = summary(fuse(model), IMAGE[1:])
    assert rows == summary(stock, IMAGE[1:])
    assert {"Conv2d-1", "BottleneckBlock-14"} <= {row[0] if isinstance(row, tuple) else row for row in rows}


def recipe(net: nn.Module, x: Tensor, dout: Tensor | None = None, autocast: object = None) -> Outcome:
    """The source's optimizer, made of the stock model, and two steps of it: all that it has moved."""
    labels, fused = torch.arange(len(x)) % 4, any(isinstance(m, Fused) for m in net.modules())
    optimizer = torch.optim.SGD(unfuse(net).parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    if fused:
        fuse(net)
    for _ in range(STEPS):
        optimizer.zero_grad()
        out = net(x)
        nn.functional.cross_entropy(out, labels).backward()
        optimizer.step()
    moved = {name: value if value.is_floating_point() else value.double() for name, value in net.state_dict().items()}
    return moved | {"output": out.detach()}


def test_b7_optimizer_made_before_fuse(unproven: None) -> None:
    net = source_b.ResNet(source_b.ResidualBlock, (1, 1, 1, 1), num_classes=4, width=8)
    hold_to_law(randomise(net), torch.randn(IMAGE), torch.float32, run=recipe)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_b8_the_whole_family(depth: int) -> None:
    ours, source = (on_meta(getattr(where, f"resnet{depth}"), **options) for where, options in ((resnet_fused, {"fused": False}), (source_b, {"num_classes": 1000})))  # fmt: skip  # noqa: E501
    stems = [model.conv1.weight.numel() for model in (ours, source)]
    assert count(ours) - stems[0] == count(source) - stems[1]
