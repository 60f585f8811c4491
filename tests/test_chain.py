"""Extents, joins, memory, layouts, repeatability: what only shows when blocks run as one chain."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import eager_blocks as eager
from resnet_fused import engines, fuse, reference
from resnet_fused.eager import ResNet, StemConfig
from resnet_fused.modules import FusedStage
from resnet_fused.train.memory import kept_for_backward

from .harness import LAYOUTS, hold_to_law, randomise, step
from .test_equivalence import DTYPES, MEMORY, STATES


def _projection(c: int, k: int, stride: int, norm: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=not norm), *([nn.BatchNorm2d(k)] if norm else []))


STAGES = {
    "basic": lambda: [eager.BasicBlock(8, 16, 2, _projection(8, 16, 2)), eager.BasicBlock(16, 16)],
    "bottleneck": lambda: [
        eager.Bottleneck(8, 4, 1, _projection(8, 16, 1)),
        eager.Bottleneck(16, 4),
        eager.Bottleneck(16, 8, 2, _projection(16, 32, 2)),
    ],
    "pad": lambda: [eager.BasicBlock(8, 16, 2, eager.PadShortcut(2, 4, 16)), eager.BasicBlock(16, 16)],
    "no-bn": lambda: [eager.BasicBlock(8, 16, 2, _projection(8, 16, 2, False)), eager.BasicBlock(16, 16)],
    "plain-then-residual": lambda: [eager.PlainBlock(8, 8), eager.PlainBlock(8, 8), eager.BasicBlock(8, 8)],
    "residual-then-plain": lambda: [eager.BasicBlock(8, 8), eager.PlainBlock(8, 12, 2)],
    "with-a-stranger": lambda: [
        eager.BasicBlock(8, 8),
        eager.BasicBlock(8, 8),
        nn.Dropout(0.0),
        eager.BasicBlock(8, 8),
    ],
}


def _stage(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*STAGES[name]())


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STAGES)
def test_stage(name: str, dtype: str, memory: str, device: str) -> None:
    x = torch.randn(3, 8, 11, 9)
    model = hold_to_law(randomise(_stage(name)), x, DTYPES[dtype], memory=memory, device=device)
    assert isinstance(model, FusedStage)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["basic", "bottleneck", "plain-then-residual"])
def test_norm_states_across_joins(name: str, state: str, device: str) -> None:
    x = torch.randn(3, 8, 11, 9)
    hold_to_law(randomise(_stage(name)), x, torch.float32, prepare=STATES[state], device=device)


def _trunk(**options: object) -> ResNet:
    torch.manual_seed(0)
    return ResNet(eager.Bottleneck, [2, 1], 5, planes=[4, 8], stem=StemConfig(8), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("shape", [(2, 3, 33, 31), (1, 3, 40, 24), (0, 3, 32, 32)], ids=str)
def test_trunk(shape: tuple[int, ...], memory: str, layout: str, device: str) -> None:
    x = torch.randn(shape)
    hold_to_law(randomise(_trunk()), x, torch.float32, memory=memory, layout=layout, device=device)


@pytest.mark.parametrize(
    "options",
    [
        {"stem": StemConfig(8, 3, 1, True, False)},
        {"stem": StemConfig(8, 5, 2, False, False)},
        {"shortcut": "A-sym"},
        {"shortcut": "C", "shortcut_bn": False, "bias": True},
    ],
    ids=str,
)
def test_trunk_options(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = ResNet(eager.BasicBlock, [1, 2], 5, planes=[8, 16], **{"stem": StemConfig(8), **options})  # type: ignore[arg-type]
    hold_to_law(randomise(model), torch.randn(2, 3, 33, 31), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_layout_is_the_stock_one(layout: str) -> None:
    stage = _stage("basic").to(memory_format=LAYOUTS[layout])
    x = torch.randn(3, 8, 11, 9).contiguous(memory_format=LAYOUTS[layout])
    want = copy.deepcopy(stage)(x)
    assert fuse(stage)(x).stride() == want.stride()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_the_parameters_strides(layout: str, memory: str) -> None:
    model = fuse(_trunk().to(memory_format=LAYOUTS[layout]), memory=memory)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride(), name


@pytest.mark.parametrize("memory", MEMORY)
def test_results_are_bitwise_repeatable(memory: str) -> None:
    model, x = fuse(_trunk(), memory=memory), torch.randn(4, 3, 48, 48)
    first, second = (step(copy.deepcopy(model), x) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_memory_modes_are_bitwise_equal() -> None:
    model, x = _trunk(), torch.randn(4, 3, 48, 48)
    results = [step(fuse(copy.deepcopy(model), memory=memory), x) for memory in MEMORY]
    for other in results[1:]:
        for name in results[0]:
            torch.testing.assert_close(other[name], results[0][name], msg=name)


# Megabytes (1e6) kept for backward per image, fp32, 224 px; parameters, buffers and the input aside.
# The bounds are the contract; the comments are what is kept.
KEPT = [
    ("resnet50", "stock", 80.0, 86.1),
    ("resnet50", "speed", 0.0, 68.0),  # every raw convolution output and every block's input
    ("resnet50", "lean", 0.0, 46.0),  # without the last 1x1's output
    ("resnet50", "min", 0.0, 27.0),  # block inputs and the stem's output
    ("resnet18", "stock", 20.0, 22.2),
    ("resnet18", "speed", 0.0, 14.5),
]


@pytest.mark.parametrize(("name", "mode", "low", "high"), KEPT)
def test_bytes_kept_for_backward(name: str, mode: str, low: float, high: float) -> None:
    model = getattr(resnet_fused, name)(fused=False).to(memory_format=torch.channels_last)
    if mode != "stock":
        fuse(model, memory=mode)
    batch = 4  # what does not grow with the batch, the per-channel vectors, is shared out over it
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    assert low <= kept_for_backward(model, x) / batch / 1e6 <= high


def test_a_plain_site_keeps_its_input_and_its_raw_output_alone() -> None:
    x = torch.randn(2, 8, 9, 7, requires_grad=True)
    stage = fuse(nn.Sequential(eager.PlainBlock(8, 8), eager.PlainBlock(8, 8)))
    vectors = 4 * (5 + 2) * 8 * 4  # moments and carriers of four sites
    assert kept_for_backward(stage, x.contiguous(memory_format=torch.channels_last)) <= 4 * x.nbytes + vectors


@pytest.mark.parametrize("memory", MEMORY)
def test_compiles_without_a_graph_break(memory: str) -> None:
    model = fuse(_stage("bottleneck").double(), memory=memory)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    want = step(copy.deepcopy(model), x)
    torch._dynamo.reset()
    got = step(torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True), x)
    for name, value in want.items():
        torch.testing.assert_close(got[f"_orig_mod.{name}" if name not in ("output", "input.grad") else name], value)


# Reads and writes of the whole activation by each primitive, beside the convolutions' own.
PASSES = {"bn_stats": (1, 0), "bn_apply": (1, 1), "bn_bwd_reduce_rebuild": (2, 1), "bn_bwd_apply": (2, 1)}


def test_passes_over_the_activation_per_inner_site(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> object:
        return lambda *a: (calls.append(name), getattr(reference, name)(*a))[1]

    primitives = [n for n in vars(reference) if n.startswith(("bn_", "conv_", "join_"))]
    engine = SimpleNamespace(**{n: counted(n) for n in primitives})
    monkeypatch.setitem(engines._ENGINES, "reference", engine)
    sites = {}
    for blocks in (1, 2):  # two more inner sites: the difference is theirs alone
        stage = fuse(nn.Sequential(*(eager.PlainBlock(8, 8) for _ in range(blocks + 1))), engine="reference")
        calls.clear()
        out = stage(torch.randn(2, 8, 5, 5, requires_grad=True))
        forward = list(calls)
        calls.clear()
        out.sum().backward()
        sites[blocks] = [Counter(c for c in part if c in PASSES) for part in (forward, calls)]
        assert not {c for c in (*forward, *calls) if c.startswith("join")}
    moved = []
    for one, two in zip(*sites.values(), strict=True):
        moved.append(tuple(sum(PASSES[n][i] * count for n, count in (two - one).items()) / 2 for i in (0, 1)))
    assert moved == [(2, 1), (4, 2)]


def test_inference_keeps_nothing_and_equals_training_off() -> None:
    model = fuse(_trunk()).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        quiet = model(x)
        assert kept_for_backward(model, x) == 0
    assert not quiet.requires_grad
    torch.testing.assert_close(model(x), quiet)


def test_add_out_of_place_promotes_under_autocast_and_in_place_does_not() -> None:
    class OutOfPlace(eager.BasicBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return torch.relu(out + x)

    torch.manual_seed(0)
    for kind, expected in ((OutOfPlace, torch.float32), (eager.BasicBlock, torch.bfloat16)):
        model = hold_to_law(randomise(kind(8, 8)), torch.randn(2, 8, 9, 7), torch.bfloat16, autocast=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.randn(2, 8, 5, 5)).dtype == expected


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_engines_agree(engine: str) -> None:
    from resnet_fused.engines import cpu

    if engine == "cpu" and (reason := cpu.load()) is not None:
        pytest.skip(f"the C++ extension does not run here: {reason}")
    hold_to_law(randomise(_trunk()), torch.randn(2, 3, 33, 31), torch.float32, engine=engine)
