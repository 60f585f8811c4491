"""`torch.compile(fullgraph=True)`: every variant gives what it gives uncompiled; later hooks and `disable` are seen.

In a quick run some variants are compiled as one function, in a full one each by itself in every memory mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import resnet_fused
from resnet_fused import eager_blocks as eager
from resnet_fused import fuse
from resnet_fused.modules import FusedBlock
from tests.harness import randomise
from tests.stack_cases import Sum, gradients, images, projection, same, stage, state
from tests.tune_harness import need_a_traced_chain


def norms(block: nn.Module, change: Callable[[nn.BatchNorm2d], object]) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            change(module)
    return block


def frozen() -> nn.Module:
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is an optional extra")
    return eager.BasicBlock(8, 8, norm_layer=ops.FrozenBatchNorm2d)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """The classes' forwards are shared, and a function is compiled for a limited number of settings."""
    torch.compiler.reset()


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: eager.BasicBlock(8, 8),
    "bottleneck, option B, biased": lambda: eager.Bottleneck(8, 4, 2, projection(8, 16, 2), bias=True),
    "plain": lambda: eager.PlainBlock(8, 8),
    "option A": lambda: eager.BasicBlock(8, 16, 2, eager.PadShortcut(2, 4, 16)),
    "option C": lambda: eager.BasicBlock(8, 8, 1, projection(8, 8)),
    "projection without batch norm": lambda: eager.BasicBlock(8, 12, 1, nn.Conv2d(8, 12, 1)),
    "out-of-place add": Sum,
    "one site": lambda: eager.ConvBNReLU(8, 8, 3),
    "stem": lambda: eager.Stem(8, 8),
    "one norm in eval": lambda: _first_in_eval(eager.BasicBlock(8, 8)),
    "all in eval": lambda: norms(eager.BasicBlock(8, 8), lambda bn: bn.eval()),
    "momentum None": lambda: norms(eager.BasicBlock(8, 8), lambda bn: setattr(bn, "momentum", None)),
    "no running statistics": lambda: eager.BasicBlock(
        8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)
    ),
    "no affine": lambda: eager.BasicBlock(8, 8, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False)),
    "FrozenBN": frozen,
}


def _first_in_eval(block: nn.Module) -> nn.Module:
    block.bn1.eval()  # type: ignore[union-attr, operator]
    return block


class Side(nn.Module):
    """Blocks side by side on one input."""

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks.values())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(block(x) for block in self.blocks)


def outcome(run: Any, model: nn.Module, x: Tensor, amp: bool = False) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = run(x)
    outs = out if isinstance(out, tuple) else (out,)
    torch.stack([o.double().square().sum() for o in outs]).sum().backward()
    assert x.grad is not None
    made = {f"out.{i}": o.detach() for i, o in enumerate(outs)}
    return {**made, "x": x.grad, **{f"{k}.grad": g for k, g in gradients(model).items()}, **state(model)}


def compiled(model: nn.Module, **options: Any) -> Any:
    need_a_traced_chain()
    return torch.compile(model, **{"backend": "aot_eager", "fullgraph": True, **options})


def hold(model: nn.Module, x: Tensor, amp: bool = False, **options: Any) -> None:
    """One step compiled and one not, from the same state."""
    twin = copy.deepcopy(model)
    same(outcome(compiled(twin, **options), twin, x, amp), outcome(model, model, x, amp))


QUICK = (
    "bottleneck, option B, biased", "option A", "projection without batch norm", "one norm in eval", "momentum None",
    "no running statistics", "no affine", "FrozenBN",
)  # fmt: skip


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(VARIANTS), marks=pytest.mark.full)], ids=["quick", "all"])
def test_variants_compile_as_one_graph(names: tuple[str, ...]) -> None:
    model = Side({name: randomise(fuse(VARIANTS[name]().double())) for name in names})
    assert all(isinstance(block, FusedBlock) for block in model.blocks)
    hold(model, images())


@pytest.mark.full
@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_compiles_without_a_break(name: str, memory: str) -> None:
    hold(randomise(fuse(VARIANTS[name]().double(), memory=memory)), images())


@pytest.mark.parametrize("memory", ["speed", *(pytest.param(m, marks=pytest.mark.full) for m in ("lean", "min"))])
def test_a_stage_under_autocast(memory: str) -> None:
    hold(fuse(stage(), memory=memory), images(dtype=torch.float32), amp=True)


@pytest.mark.full
@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
def test_a_trunk(memory: str) -> None:
    model = resnet_fused.cifar_resnet(8, fused=False).double()
    hold(fuse(model, memory=memory), torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.full
def test_a_stage_under_inductor() -> None:
    hold(fuse(stage().double()), images(), backend="inductor")


@pytest.mark.full
def test_batch_sizes_stay_open() -> None:
    model = fuse(stage().double())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    twin = copy.deepcopy(model)
    run = compiled(twin, backend=counter, dynamic=True)
    counts = []
    for batch in (2, 3, 5, 7):
        same(outcome(run, twin, images(batch, batch)), outcome(model, model, images(batch, batch)))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[-2]  # settled, after one compilation more than stock's


def test_what_is_hooked_or_disabled_after_compiling_is_seen() -> None:
    """Compiled code looks at the hooks of a fused block's modules; those of stock modules added later never fire."""
    model = fuse(nn.Sequential(eager.BasicBlock(8, 8)).double()).eval()
    expected = model(images())
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(model, backend=counter)
    calls: list[int] = []

    def operators() -> str:
        return " ".join(str(node.target) for node in counter.graphs[-1].graph.nodes)

    same(run(images()), expected)
    assert "batch_norm" not in operators()
    with resnet_fused.disable():
        same(run(images()), expected)
    assert "batch_norm" in operators() and counter.frame_count == 2
    run(images())
    assert counter.frame_count == 2
    handle = model[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    same(run(images()), expected)
    assert calls
    handle.remove()
    seen = len(calls)
    same(run(images()), expected)
    assert len(calls) == seen


@pytest.mark.parametrize("owner", ["block", pytest.param("stage", marks=pytest.mark.full)])
def test_a_part_that_was_compiled_by_itself_is_called(owner: str) -> None:
    """``module.compile()``: the stage and the trunk around it leave it to its own compiled code."""
    need_a_traced_chain()
    model = fuse(resnet_fused.cifar_resnet(14, fused=False).double()).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    (model.layer2 if owner == "stage" else model.layer2[1]).compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        same(model(x), expected)
    assert counter.frame_count == 1


@pytest.mark.full
def test_disable_inside_a_compiled_function() -> None:
    model = fuse(eager.BasicBlock(8, 8).double()).eval()

    def both(x: Tensor) -> Tensor:
        with resnet_fused.disable():
            first = model(x)
        return first - model(x)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x = images()
    same(compiled(both, backend=counter)(x), torch.zeros_like(x))  # type: ignore[arg-type]
    (graph,) = counter.graphs
    assert "batch_norm" in str([str(node.target) for node in graph.graph.nodes])
    assert resnet_fused.limits._disabled == 0


@pytest.mark.full
def test_a_compiled_transform() -> None:
    model = fuse(stage().double()).eval()
    gradient = torch.func.grad(lambda x: model(x).square().sum())
    with resnet_fused.disable():
        expected = gradient(images())
    same(compiled(gradient)(images()), expected)  # type: ignore[arg-type]
