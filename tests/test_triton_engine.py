"""The Triton engine end to end: training steps, mixed states, and what runs where a kernel does not compile.

Every launch executes its compiled PTX on CPU tensors, or runs on a GPU where there is one.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")

import resnet_fused
from resnet_fused import eager_blocks as eager
from resnet_fused.numerics import assert_law

from .engine_harness import (
    CHANNELS,
    OURS,
    basic,
    bottleneck,
    convolutions,
    fresh_engine,
    fused,
    images,
    needs_compiler,
    projection,
    running,
)
from .harness import LAYOUTS, hold_to_law, randomise, step
from .test_equivalence import STATES

__all__ = ["fresh_engine"]
pytestmark = [needs_compiler, pytest.mark.filterwarnings("error:resnet_fused")]
STEPS = 3
FLOAT, HALF = torch.float32, torch.bfloat16


def _net(kind: str, shortcut: str = "B") -> nn.Module:
    torch.manual_seed(0)
    widths = [4, 8] if kind == "bottleneck" else None
    net = resnet_fused.from_stages(
        [1, 1],
        [8, 16],
        widths,
        stem_kernel=3,
        stem_relu=True,
        stem_pool=True,
        bias=False,
        shortcut=shortcut,
        fused=False,
    )
    return randomise(net)


def _train(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """`STEPS` steps of SGD on a linear loss; after each: output, gradients, parameters and buffers, in float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True)
    seen = []
    for i in range(STEPS):
        generator = torch.Generator().manual_seed(i)
        batch = torch.roll(x, i, 0)
        optimizer.zero_grad()
        out = model(batch)
        out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
        found = {"output": out.detach(), **{f"{n}.grad": p.grad for n, p in model.named_parameters()}}
        optimizer.step()
        found.update((name, value.detach()) for name, value in model.state_dict().items())
        seen.append({name: value.to("cpu", torch.float64, copy=True) for name, value in found.items()})
    return seen


def hold_training_to_law(model: nn.Module, x: Tensor, dtype: torch.dtype, device: str, arch: str, memory: str) -> None:
    stock, x = model.to(dtype).to(device), x.to(dtype).to(device)
    ref = _train(copy.deepcopy(stock).double(), x.double())
    eager_runs = [
        _train(copy.deepcopy(stock).to(memory_format=layout), x.contiguous(memory_format=layout))
        for layout in LAYOUTS.values()
    ]
    with running("own", arch, device) as launches:
        got = _train(fused(stock, memory=memory), x.contiguous(memory_format=torch.channels_last))
    assert convolutions(launches) == OURS
    for i in range(STEPS):
        assert_law(got[i], ref[i], [run[i] for run in eager_runs], dtype)


NETS = {"bottleneck": ("bottleneck", "B"), "basic": ("basic", "B"), "option A": ("basic", "A")}


@pytest.mark.parametrize("net", NETS)
def test_training_steps(net: str, device: str) -> None:
    hold_training_to_law(_net(*NETS[net]), images(4, size=(13, 11), channels=3), FLOAT, device, "sm_90", "speed")


@pytest.mark.full
@pytest.mark.parametrize("memory", ["lean", "min"])
@pytest.mark.parametrize("net", NETS)
def test_training_steps_in_every_memory_mode(net: str, memory: str, device: str) -> None:
    hold_training_to_law(_net(*NETS[net]), images(6, size=(15, 13), channels=3), FLOAT, device, "sm_90", memory)


@pytest.mark.full
@pytest.mark.parametrize("net", NETS)
def test_training_steps_on_the_older_target(net: str) -> None:
    hold_training_to_law(_net(*NETS[net]), images(6, size=(15, 13), channels=3), FLOAT, "cpu", "sm_80", "speed")


def hold_block_to_law(block: nn.Module, x: Tensor, dtype: torch.dtype = FLOAT, **options: object) -> nn.Module:
    """`hold_to_law` of the Triton engine, our kernels where they can; returns the fused block."""
    variant, arch = options.pop("variant", "own"), options.pop("arch", "sm_90")
    with running(variant, arch) as launches:  # type: ignore[arg-type]
        model = hold_to_law(block, x, dtype, engine="triton", **options)  # type: ignore[arg-type]
    assert launches or not x.numel()
    assert bool(convolutions(launches)) == (variant == "own" and x.numel() > 0)
    return model


def test_a_block_in_bf16() -> None:
    hold_block_to_law(basic(), images(size=(3, 4)), HALF)


BLOCKS = {"bottleneck": bottleneck, "basic": basic}
EXTENTS = {
    "a stage": lambda: nn.Sequential(bottleneck(), bottleneck()),
    "a stage of basic blocks": lambda: nn.Sequential(basic(), basic()),
    "strides": lambda: nn.Sequential(
        eager.Bottleneck(CHANNELS, 4, 2, projection(CHANNELS, 16, 2)), eager.Bottleneck(16, 4)
    ),
    "option A": lambda: nn.Sequential(
        eager.BasicBlock(CHANNELS, 16, 2, eager.PadShortcut(2, 4, 16)), eager.BasicBlock(16, 16)
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [HALF, torch.float16, FLOAT], ids=str)
@pytest.mark.parametrize("name", EXTENTS)
def test_stages(name: str, dtype: torch.dtype, arch: str, memory: str) -> None:
    hold_block_to_law(randomise(EXTENTS[name]()), images(3), dtype, arch=arch, memory=memory)


@pytest.mark.parametrize("state", STATES)
def test_norm_state(state: str) -> None:
    hold_block_to_law(bottleneck(), images(), prepare=STATES[state])


NORMS = {
    "no affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "its own eps and momentum": {"eps": 1e-2, "momentum": 0.7},
}


@pytest.mark.parametrize("options", [pytest.param(o, id=name) for name, o in NORMS.items()])
def test_norm_options(options: dict[str, object]) -> None:
    hold_block_to_law(basic(norm_layer=lambda c: nn.BatchNorm2d(c, **options)), images())  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_biased_convolutions(training: bool) -> None:
    hold_block_to_law(basic(bias=True).train(training), images())


@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_non_finite_values_go_where_torch_lets_them(training: bool, value: float) -> None:
    x = images()
    x[1, 2, 3, 1] = value
    hold_block_to_law(basic().train(training), x)


@pytest.mark.parametrize("name", BLOCKS)
def test_batch_of_one(name: str) -> None:
    hold_block_to_law(BLOCKS[name](), images(1))


@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
@pytest.mark.parametrize("name", BLOCKS)
def test_an_empty_batch_starts_no_convolution(name: str, memory: str) -> None:
    block, x = BLOCKS[name](), images(0)
    with running() as launches:
        got = step(fused(block, memory=memory), x)
    assert not convolutions(launches)
    want = step(copy.deepcopy(block), x)
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=key)
        assert not key.endswith(".grad") or not got[key].any()


@pytest.mark.parametrize("memory", ["speed", "min"])
def test_one_value_per_channel_is_refused_as_torch_refuses_it(memory: str) -> None:
    block, x = basic(), images(1, size=(1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as stock:
        copy.deepcopy(block)(x)
    with running(), pytest.raises(ValueError) as ours:
        fused(block, memory=memory)(x)
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("name", ["basic", pytest.param("bottleneck", marks=pytest.mark.full)])
def test_autocast(name: str) -> None:
    hold_block_to_law(BLOCKS[name](), images(size=(3, 4)), HALF, autocast=True)


def test_groups_run_in_the_library_beside_ours() -> None:
    torch.manual_seed(0)
    block = randomise(eager.Bottleneck(CHANNELS, CHANNELS, out_channels=CHANNELS, groups=2))
    with running() as launches:
        hold_to_law(block, images(), FLOAT, engine="triton")
    assert convolutions(launches) == OURS and any(launch.kernel == "_bn_stats_kernel" for launch in launches)


@pytest.mark.parametrize("name", BLOCKS)
def test_library_variant(name: str) -> None:
    hold_block_to_law(BLOCKS[name](), images(), variant="library")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_in_is_layout_out(layout: str) -> None:
    block = hold_block_to_law(basic(), images(), layout=layout)
    x = images().contiguous(memory_format=LAYOUTS[layout])
    with running():
        assert block(x).stride() == resnet_fused.unfuse(copy.deepcopy(block))(x).stride()


FROZEN = {
    "the input": (),
    "the first weight": ("conv1.weight",),
    "every weight": ("conv1.weight", "conv2.weight"),
    "an affine": ("bn1.weight", "bn2.bias"),
    "the parameters": ("conv1.weight", "conv2.weight", "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"),
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_gradients_that_nobody_asked_for(frozen: str) -> None:
    block = basic()
    for name in FROZEN[frozen]:
        block.get_parameter(name).requires_grad_(False)
    wants_input = bool(FROZEN[frozen])

    def gradients(model: nn.Module) -> dict[str, Tensor | None]:
        x = images().requires_grad_(wants_input)
        out = model(x)
        out.backward(torch.ones_like(out))
        return {"x": x.grad, **{name: parameter.grad for name, parameter in model.named_parameters()}}

    with running():
        whole, got = (gradients(model) for model in (fused(basic()), fused(block)))
    for name, value in got.items():
        unwanted = name in FROZEN[frozen] or (name == "x" and not wants_input)
        assert (value is None) == unwanted, name
        assert value is None or whole[name] is None or torch.equal(value, whole[name]), name
