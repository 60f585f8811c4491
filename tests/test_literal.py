"""One batch norm for several sites, and one between the add and its ReLU: literal mode."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import explain, fuse, structure
from resnet_fused.eager_blocks import BasicBlock
from resnet_fused.infer import infers
from resnet_fused.numerics import assert_law
from resnet_fused.recognise import Refusal, find_chains, recognise
from resnet_fused.spec import ChainSpec, ShortcutSpec, SiteSpec

from .harness import hold_to_law, randomise, step
from .models.source_c import BuildingBlock, LiteralBottleneckBlock, LiteralBuildingBlock, literal_net
from .test_equivalence import DTYPES, MEMORY, STATES
from .test_recognise import Block, found, make


def shortcut_first(b: Block, x: Tensor) -> Tensor:
    identity = b.bn1(b.skip(x))
    return b.act(b.bn1(b.main(x) + identity))


def _one_norm(b: Block, x: Tensor) -> Tensor:
    return b.act(b.bn1(b.conv2(b.act(b.bn1(b.conv1(x))))) + x)


def _in_place(b: Block, x: Tensor) -> Tensor:
    out = b.main(x)
    out += x
    return b.relu(b.bn1(out))


# name: the block, its input channels, and how often each of its batch norms moves in a forward
BLOCKS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "basic": (lambda: LiteralBuildingBlock(8, 8), 8, {"batch": 3}),
    "basic-down": (lambda: LiteralBuildingBlock(8, 12, True), 8, {"batch": 4}),
    "bottleneck": (lambda: LiteralBottleneckBlock(12, 12, 6), 12, {"batch1": 2, "batch2": 2}),
    "bottleneck-down": (lambda: LiteralBottleneckBlock(8, 12, 6, True), 8, {"batch1": 2, "batch2": 3}),
    "own-norm-after-the-add": (
        lambda: make(lambda b, x: F.relu(b.late(b.main(x) + x)), 8, 8, late=nn.BatchNorm2d(8)),
        8,
        {"bn1": 1, "bn2": 1, "late": 1},
    ),
    "no-relu-after-the-norm": (lambda: make(lambda b, x: b.bn2(b.main(x) + x), 8, 8), 8, {"bn1": 1, "bn2": 2}),
    "shared-without-norm-after-the-add": (lambda: make(_one_norm, 8, 8), 8, {"bn1": 2, "bn2": 0}),
    "add-in-place": (lambda: make(_in_place, 8, 8), 8, {"bn1": 2, "bn2": 1}),
    "shortcut-first": (
        lambda: make(shortcut_first, 8, 12, 2, skip=nn.Conv2d(8, 12, 1, 2)),
        8,
        {"bn1": 3, "bn2": 1},
    ),
    "shortcut-without-norm": (
        lambda: make(lambda b, x: b.act(b.bn1(b.main(x) + b.skip(x))), 8, 12, 2, skip=nn.Conv2d(8, 12, 1, 2)),
        8,
        {"bn1": 2, "bn2": 1},
    ),
}


def block_of(name: str) -> tuple[nn.Module, Tensor]:
    build, channels, _ = BLOCKS[name]
    torch.manual_seed(0)
    return randomise(build()), torch.randn(3, channels, 7, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, dtype: str, device: str) -> None:
    block, x = block_of(name)
    fused = hold_to_law(block, x, DTYPES[dtype], device=device)
    assert explain(fused).blocks[0].fused


@pytest.mark.parametrize("name", BLOCKS)
def test_batches_are_counted_at_every_use(name: str) -> None:
    block, x = block_of(name)
    moved = fuse(block)
    moved(x)
    moved(x)
    counts = {path: int(moved.get_submodule(path).num_batches_tracked) for path in BLOCKS[name][2]}
    assert counts == {path: 2 * times for path, times in BLOCKS[name][2].items()}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["basic", "basic-down", "bottleneck-down", "shortcut-first"])
def test_norm_state(name: str, state: str) -> None:
    block, x = block_of(name)
    hold_to_law(block, x, torch.float32, prepare=STATES[state])


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False}], ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_norm_options(training: bool, options: dict[str, bool]) -> None:
    block = LiteralBuildingBlock(8, 12, True)
    block.batch = nn.BatchNorm2d(12, **options)  # type: ignore[arg-type]
    hold_to_law(randomise(block).train(training), torch.randn(2, 8, 7, 5), torch.float32)


def test_frozen_batch_norm_for_every_use() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="FrozenBatchNorm2d is torchvision's")
    block = LiteralBuildingBlock(8, 12, True)
    block.batch = ops.FrozenBatchNorm2d(12)
    for name, value in (("weight", 0.7), ("bias", -0.2), ("running_mean", 0.3), ("running_var", 1.4)):
        getattr(block.batch, name).copy_(torch.linspace(0.5, 1.5, 12) * value)
    hold_to_law(block, torch.randn(2, 8, 7, 5), torch.float32)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_stage(bottleneck: bool, memory: str) -> None:
    """The first site of a block reads the norm after the add of the block before it, pending."""
    stage = randomise(literal_net(bottleneck))
    x = torch.randn(2, 16 if bottleneck else 8, 7, 5)
    fused = hold_to_law(stage, x, torch.float32, memory=memory)
    assert {record.plan.extent for record in explain(fused).blocks if record.plan} == {"stage"}


def test_stage_whose_second_block_runs_itsshortcut_first() -> None:
    stage = nn.Sequential(LiteralBuildingBlock(8, 8), make(shortcut_first, 8, 12, 2, skip=nn.Conv2d(8, 12, 1, 2)))
    hold_to_law(randomise(stage), torch.randn(2, 8, 7, 5), torch.float32)


@pytest.mark.parametrize("name", ["basic", "basic-down", "add-in-place", "own-norm-after-the-add"])
def test_autocast(name: str) -> None:
    """The dtype of the sum, and so of the norm after it, is the stock one: wide where the add promotes."""
    block, x = block_of(name)
    hold_to_law(block, x, torch.bfloat16, autocast=True)


def test_inference_is_eval_without_gradients() -> None:
    block, x = block_of("basic-down")
    block = fuse(block).eval()
    with torch.no_grad():
        out = block(x)
    assert torch.equal(out, block(x)) and not out.requires_grad


def test_a_norm_after_the_add_has_no_epilogue_to_run_in() -> None:
    pytest.importorskip("triton", reason="the Triton engine has the epilogues")
    for block, expected in ((BuildingBlock(4, 4), True), (LiteralBuildingBlock(4, 4), False)):
        with torch.no_grad():
            assert infers(fuse(block).eval().as_link(), "triton", torch.ones(1, 4, 5, 5)) == expected


def test_a_stage_of_one_literal_block_is_its_wrapper() -> None:
    assert [name for name, _, _ in find_chains(nn.Sequential(LiteralBuildingBlock(4, 4)))] == ["0"]


def test_steps_move_the_same_weights() -> None:
    """Two steps of SGD with weight decay; the shared affine has one gradient, the sum of all uses."""
    nets = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        nets[dtype] = randomise(literal_net(False)).to(dtype)
    ours, theirs, ref = fuse(copy.deepcopy(nets[torch.float32])), nets[torch.float32], nets[torch.float64]
    x = torch.randn(2, 8, 7, 5)
    for model in (ours, theirs, ref):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            step(model, x.to(next(model.parameters()).dtype))
            optimizer.step()
    state = {k: v.double() for k, v in ref.state_dict().items()}
    assert_law(ours.state_dict(), state, [theirs.state_dict()], torch.float32)


def test_specs() -> None:
    sites = (SiteSpec("conv1", "batch"), SiteSpec("conv2", "batch", False))
    down = ShortcutSpec("projection", SiteSpec("down", "batch", False))
    spec = found(LiteralBuildingBlock(4, 4, True))
    assert spec == ChainSpec(sites, down, inplace_add=False, inner=("relu",), post="batch")
    assert spec.norms() == ("batch",) * 4 and spec.shared_norms() == {"batch": 4}
    assert spec.uses() == (("batch", "conv1"), ("batch", "conv2"), ("batch", "down"), ("batch", ""))
    assert spec.paths() == ("conv1", "batch", "conv2", "down", "relu")
    first = found(make(shortcut_first, skip=nn.Conv2d(4, 4, 1)))
    assert first.shortcut.first and first.uses()[0] == ("bn1", "skip") and first.post == "bn1"
    own = found(BLOCKS["own-norm-after-the-add"][0]())
    assert own.post == "late" and own.inner == ("relu",) and not own.shared_norms() and own.is_literal()
    assert not found(Block()).is_literal() and not found(Block()).shortcut.first


def test_a_torchvision_block_that_shares_a_norm_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    block = BasicBlock(4, 4)
    block.bn2 = block.bn1
    monkeypatch.setattr(sys.modules["resnet_fused.fuse"], "probe", lambda *_: "probed")
    assert explain(fuse(block)).blocks[0].reason == "probed"


def test_a_hook_on_the_shared_norm_fires_at_every_use() -> None:
    block, x = block_of("basic-down")
    stock, block = copy.deepcopy(block), fuse(block)
    calls: list[tuple[int, ...]] = []
    for model in (stock, block):
        model.batch.register_forward_hook(lambda _, __, out: calls.append(tuple(out.shape)))
    expected = stock(x)
    with pytest.warns(UserWarning, match="hook on batch"):
        assert torch.equal(block(x), expected)
    assert calls == calls[:4] * 2


def test_a_synchronised_norm_after_the_add_runs_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "_runs_norm", lambda _: True)  # elsewhere a chain may run one
    block = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(LiteralBuildingBlock(4, 4))).eval()
    with pytest.warns(UserWarning, match="batch is a SyncBatchNorm, which the chain does not run"):
        block(torch.randn(2, 4, 5, 5))
    refused = recognise(nn.SyncBatchNorm.convert_sync_batchnorm(LiteralBuildingBlock(4, 4)))
    assert refused == Refusal("batch norm 'batch' after the add is a SyncBatchNorm")


def test_one_value_per_channel_is_refused_as_in_stock() -> None:
    block = fuse(LiteralBuildingBlock(4, 4))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize("name", ["basic-down", pytest.param("shortcut-first", marks=pytest.mark.full)])
def test_compiles_without_a_graph_break(name: str) -> None:
    block, x = block_of(name)
    block, x = fuse(block.double()), x.double()
    want = step(copy.deepcopy(block), x)
    torch._dynamo.reset()
    got = step(torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True), x)
    got = {key.replace("_orig_mod.", ""): value for key, value in got.items()}
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value)


def test_results_are_bitwise_repeatable() -> None:
    block, x = block_of("basic-down")
    first, second = (step(copy.deepcopy(fuse(block)), x) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_convolution_that_is_shared_stays_refused() -> None:
    block = make(lambda b, x: b.act(b.bn1(b.bn1(b.conv1(b.act(b.bn1(b.conv1(x))))) + x)))
    assert recognise(block) == Refusal("convolution 'conv1' is used 2 times in one forward")
