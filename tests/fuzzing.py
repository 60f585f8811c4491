"""Random blocks for the fuzzer: what a case is, how it is built, and how it is judged.

A failing case prints as ``Case(...)`` and runs again by ``python -m tests.fuzzing "Case(...)"``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import currently_in_test_context, event, reject
from hypothesis import strategies as st
from torch import Tensor, nn

from resnet_fused import eager_blocks as eager
from resnet_fused import fuse
from resnet_fused.modules import Fused
from resnet_fused.numerics import judge_all
from resnet_fused.probe import PROBE_TOLERANCE
from tests.harness import LAYOUTS, Outcome, draw, randomise, stack, step
from tests.models import source_a, source_c, source_d

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.bfloat16}
NORMS = ("train", "eval", "frozen", "cumulative", "untracked", "no affine", "zero gamma", "no gamma gradient")
SHORTCUTS = ("identity", "projection", "bare projection", "pad", "pad symmetric", "average pool")
KINDS = (
    "basic",
    "bottleneck",
    "plain",
    "conv",
    "stem",
    "a basic",
    "a bottleneck",
    "d basic",
    "d bottleneck",
    "literal",
)
INPUTS = 6  # that a tensor must break the law on, to be called wrong, each by itself
AT_ONCE = 64  # and all together
VALUES = ("normal", "positive", "huge mean", "zeros", "one nan", "one inf")


@dataclasses.dataclass(frozen=True)
class Case:
    """One block, or a stage of two, and one training or eval step of it. Every field is a plain value."""

    kind: str = "basic"
    c: int = 8
    k: int = 8
    stride: int = 1
    kernel: int = 3
    dilation: int = 1
    groups: int = 1
    bias: bool = False
    stride_in: str = "3x3"
    shortcut: str = "identity"
    pool: bool = False
    relu: bool = True
    stage: bool = False
    norms: tuple[str, ...] = ("train",)  # of the block's norms in order, repeated
    training: bool = True
    n: int = 2
    h: int = 8
    w: int = 8
    values: str = "normal"
    input_grad: bool = True
    frozen_convs: bool = False
    layout: str = "channels_last"
    strided: bool = False  # the input is a view that steps over elements
    memory: str = "speed"
    engine: str | None = None
    dtype: str = "fp32"
    seed: int = 0


def cases() -> st.SearchStrategy[Case]:
    """All cases; hypothesis shrinks towards the first choice of each field."""
    size = st.integers(1, 14)
    channels = st.sampled_from([8, 16, 3, 1, 5, 17, 24, 33])
    return st.builds(
        Case,
        kind=st.sampled_from((*KINDS, "basic", "bottleneck", "basic")),  # the kinds that take every shortcut
        c=channels,
        k=channels,
        stride=st.sampled_from([1, 2, 3]),
        kernel=st.sampled_from([3, 1, 5, 2]),
        dilation=st.sampled_from([1, 2]),
        groups=st.sampled_from([1, 2]),
        bias=st.booleans(),
        stride_in=st.sampled_from(["3x3", "1x1"]),
        shortcut=st.sampled_from(SHORTCUTS),
        pool=st.booleans(),
        relu=st.booleans(),
        stage=st.booleans(),
        norms=st.lists(st.sampled_from(NORMS), min_size=1, max_size=4).map(tuple),
        training=st.booleans(),
        n=st.sampled_from([2, 3, 1, 0, 4]),
        h=size,
        w=size,
        values=st.sampled_from(VALUES),
        input_grad=st.booleans(),
        frozen_convs=st.booleans(),
        layout=st.sampled_from(list(LAYOUTS)),
        strided=st.booleans(),
        memory=st.sampled_from(["speed", "lean", "min"]),
        engine=st.sampled_from([None, "reference"]),
        dtype=st.sampled_from(list(DTYPES)),
        seed=st.integers(0, 999),
    )


def build(case: Case) -> nn.Module:
    """The stock module of a case, in float32, with its norms' states."""
    torch.manual_seed(case.seed)
    blocks = [_block(case, case.c, case.k, case.stride)]
    if case.stage:
        blocks.append(_block(dataclasses.replace(case, shortcut="identity", pool=False), _width(case), case.k, 1))
    model = randomise(nn.Sequential(*blocks) if case.stage else blocks[0], case.seed).train(case.training)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    ends = {_last_norm(block) for block in blocks} if case.kind != "literal" else set()
    for i, norm in enumerate(norms):
        state = case.norms[i % len(case.norms)]
        # inside a block it would make constants, whose next batch norm is rounding noise in any program
        _set_state(norm, "train" if state == "zero gamma" and norm not in ends else state)
    if case.frozen_convs:
        for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            conv.requires_grad_(False)
    return model


def _last_norm(block: nn.Module) -> nn.BatchNorm2d:
    """The last batch norm of a block's main path; a shortcut's is in a child."""
    return [m for m in block.children() if isinstance(m, nn.BatchNorm2d)][-1]


def _width(case: Case) -> int:
    """Output channels of the case's first block."""
    if case.kind in ("bottleneck", "d bottleneck"):
        return 4 * _groups(case, case.k)
    if case.kind == "literal" and case.stride == 1:
        return case.c
    return case.k


def _groups(case: Case, k: int) -> int:
    """``k`` channels in as many groups as divide it; a grouped bottleneck's planes times its groups."""
    return k if case.groups == 1 else 2 * ((k + 1) // 2)


def _block(case: Case, c: int, k: int, stride: int) -> nn.Module:
    if case.kind == "conv":
        return eager.ConvBNReLU(c, k, case.kernel, stride, dilation=case.dilation, bias=case.bias, relu=case.relu)
    if case.kind == "stem":
        return eager.Stem(c, k, case.kernel, stride, bias=case.bias, relu=case.relu or case.pool, pool=case.pool)
    if case.kind == "a basic":
        return source_a.ResidualBlock(c, k, stride)
    if case.kind == "a bottleneck":
        return source_a.BottleneckResidualBlock(c, max(1, k // 2), k, stride)
    if case.kind == "d basic":
        return source_d.ResidualBlockType1(c, k, stride)
    if case.kind == "d bottleneck":
        return source_d.ResidualBlockType2(c, _groups(case, k), stride)
    if case.kind == "literal":
        width = k if stride > 1 else c
        return source_c.LiteralBuildingBlock(c, width, downsample=stride > 1)
    if case.kind == "plain":
        return eager.PlainBlock(c, k, stride, bias=case.bias)
    if case.kind == "basic":
        return eager.BasicBlock(c, k, stride, _shortcut(case, c, k, stride), bias=case.bias)
    planes = _groups(case, k)
    return eager.Bottleneck(
        c,
        planes,
        stride,
        _shortcut(case, c, 4 * planes, stride),
        groups=case.groups,
        base_width=64 // case.groups,
        dilation=case.dilation,
        stride_in=case.stride_in,  # type: ignore[arg-type]
        bias=case.bias,
    )


def _shortcut(case: Case, c: int, k: int, stride: int) -> nn.Module | None:
    """What the case asks for where it fits, else the projection that does."""
    if case.shortcut == "identity" and c == k and stride == 1:
        return None
    if case.shortcut.startswith("pad") and c <= k:
        return eager.PadShortcut(stride, (k - c) // 2 if case.shortcut == "pad symmetric" else 0, k)
    if case.shortcut == "average pool":
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        return nn.Sequential(pool, nn.Conv2d(c, k, 1, bias=case.bias), nn.BatchNorm2d(k))
    conv = nn.Conv2d(c, k, 1, stride, bias=case.bias)
    return nn.Sequential(conv) if case.shortcut == "bare projection" else nn.Sequential(conv, nn.BatchNorm2d(k))


def _set_state(norm: nn.BatchNorm2d, state: str) -> None:
    if state in ("eval", "frozen"):
        norm.eval()
    if state == "frozen":
        norm.requires_grad_(False)
    elif state == "cumulative":
        norm.momentum = None
    elif state == "untracked":
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    elif state == "no affine":
        norm.affine = False
        norm.weight = norm.bias = None
    elif state == "zero gamma":
        nn.init.zeros_(norm.weight)
    elif state == "no gamma gradient":
        norm.weight.requires_grad_(False)


def images(case: Case) -> Tensor:
    """The input, in float64."""
    shape = (case.n, case.c, case.h, case.w)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    if case.values == "positive":
        x = x.abs()
    elif case.values == "huge mean":
        # float64 is compared with itself: what a mean costs in digits must stay below the probe's bound. 16 bits of a
        # smaller spread would leave one value.
        x = x * (1e-2 if case.dtype == "fp32" else 1.0) + 100.0
    elif case.values == "zeros":
        x = x.clamp(min=0.0)
    elif x.numel() and case.values.startswith("one"):
        x.view(-1)[x.numel() // 2] = float("nan") if case.values == "one nan" else float("inf")
    return x


def verify(case: Case) -> None:
    """Raise AssertionError, naming what differs, unless the fused module does what the stock one does."""
    stock = build(case)
    x = images(case)
    if case.dtype == "fp64" or not _runs(stock, x):
        _verify_double(case, stock.double(), x)
        return
    if case.dtype != "fp32" and _leaves_values_idle(stock, x):
        if currently_in_test_context():
            event("drawn again: the library's 16-bit weight gradient is wrong where taps or pixels are idle")
            reject()
        return
    with _one_thread() if case.dtype == "fp32" and _overruns_in_float32(stock) else contextlib.nullcontext():
        _verify_law(case, stock, x)


def _verify_law(case: Case, stock: nn.Module, x: Tensor) -> None:
    """Under the law; as in `check`, a tensor is wrong if it breaks the law on each of several inputs.

    On one input a ReLU within rounding of zero may fall either way; in float64, above, none does. Where a tensor has a
    few elements, eager's error may be small by luck as well: what is left is judged on many inputs at once.
    """
    dtype = DTYPES[case.dtype]
    own = torch.float32 if case.dtype in ("fp32", "autocast") else dtype
    stock = stock.to(own)
    laid = copy.deepcopy(stock).to(memory_format=LAYOUTS[case.layout])
    fused = fuse(laid, memory=case.memory, engine=case.engine)
    amp = dtype if case.dtype == "autocast" else None
    wrong: dict[str, str] | None = None
    draws: list[tuple[Outcome, ...]] = []
    for i in range(AT_ONCE):
        drawn = images(dataclasses.replace(case, seed=case.seed + 1000 * i)).to(own)
        draws.append(draw(stock, fused, drawn, LAYOUTS[case.layout], amp, functools.partial(step, seed=i)))
        if i < INPUTS:
            wrong = _broken(draws[-1], dtype, wrong)
            if not wrong:
                return
    wrong = _broken(tuple(stack(outcomes) for outcomes in zip(*draws, strict=True)), dtype, wrong)
    if wrong:
        raise AssertionError("\n".join(wrong.values()))


def _broken(outcomes: tuple[Outcome, ...], dtype: torch.dtype, among: dict[str, str] | None) -> dict[str, str]:
    """What breaks the law in these outcomes, of the tensors in ``among`` (None: of all)."""
    got, ref, *eager = outcomes
    failed = {v.name: str(v) for v in judge_all(got, ref, eager, dtype) if not v.passed}
    return failed if among is None else {name: text for name, text in failed.items() if name in among}


def _runs(stock: nn.Module, x: Tensor) -> bool:
    """Whether stock accepts the case; one that it refuses is compared in float64, by its error."""
    try:
        copy.deepcopy(stock)(x.float())
    except (RuntimeError, ValueError):
        return False
    return True


def _overruns_in_float32(stock: nn.Module) -> bool:
    """Whether a convolution is one whose float32 weight gradient writes past its memory on more than one thread.

    That is stock PyTorch's (oneDNN's jit_1x1), for a 1x1 of stride 2 or 3 from fewer than 16 channels in channels_last.
    On one thread it stays inside, as it does from 16 channels on.
    """
    convs = (m for m in stock.modules() if isinstance(m, nn.Conv2d))
    return any(c.kernel_size == (1, 1) and max(c.stride) > 1 and c.in_channels // c.groups < 16 for c in convs)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _leaves_values_idle(stock: nn.Module, x: Tensor) -> bool:
    """Whether a convolution has a tap that meets nothing but padding, or steps over pixels that no tap meets.

    oneDNN's 16-bit weight gradient, in stock PyTorch alone, gives made-up numbers in the first case (a 3x3 of stride 3
    on one pixel) and writes past its memory in the second (a 1x1 of stride 2 from 3 or 8 channels on 14x14 pixels,
    seen with glibc's heap checks).
    """
    idle: list[bool] = []

    def look(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for size, k, s, p, d in zip(
            inputs[0].shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True
        ):
            steps = range((size + 2 * p - d * (k - 1) - 1) // s + 1)
            idle.append(s > d * (k - 1) + 1)
            idle.append(any(all(not 0 <= q * s + r * d - p < size for q in steps) for r in range(k)))

    watched = copy.deepcopy(stock)
    for conv in (m for m in watched.modules() if isinstance(m, nn.Conv2d)):
        conv.register_forward_pre_hook(look)
    watched(x.float())
    return any(idle)


def _verify_double(case: Case, stock: nn.Module, x: Tensor) -> None:
    """In float64, bound by the probe's tolerance: the semantics, with no rounding to hide behind. Errors included."""
    fused = fuse(copy.deepcopy(stock), memory=case.memory, engine=case.engine)
    assert any(isinstance(m, Fused) for m in fused.modules()), "nothing was fused"
    ref, got = _outcome(case, stock, x), _outcome(case, fused, x)
    if isinstance(ref, str) or isinstance(got, str):
        assert got == ref
        return
    assert got.keys() == ref.keys()
    for name in ref:
        _assert_close(name, got[name], ref[name])


def _outcome(case: Case, model: nn.Module, x: Tensor) -> dict[str, Tensor] | str:
    """What one step leaves behind, or the error it ends in."""
    model = model.to(memory_format=LAYOUTS[case.layout])
    x = x.contiguous(memory_format=LAYOUTS[case.layout])
    if case.strided:
        x = torch.stack([x, x], dim=-1)[..., 0]
    try:
        if not case.input_grad:
            with torch.no_grad():
                return {"output": model(x), **{name: b.clone() for name, b in model.named_buffers()}}
        return step(model, x)
    except (RuntimeError, ValueError) as error:
        # which batch norm of a block is refused first depends on whether its forward begins with the shortcut
        return f"{type(error).__name__}: {error}".partition(", got input size")[0]


def _assert_close(name: str, got: Tensor, ref: Tensor) -> None:
    assert got.shape == ref.shape and got.dtype == ref.dtype, f"{name}: {got.dtype} {tuple(got.shape)}"
    assert torch.equal(got.isfinite(), ref.isfinite()), f"{name}: NaN or Inf elsewhere than in stock"
    got, ref = got.nan_to_num(0.0, 0.0, 0.0), ref.nan_to_num(0.0, 0.0, 0.0)
    if ref.numel():
        error, size = (got - ref).abs().max().item(), ref.abs().max().item()
        assert error <= PROBE_TOLERANCE * max(size, 1.0), f"{name}: differs by {error:.2e} of {size:.2e}"


def main(arguments: list[str]) -> Any:
    """Verify the case that is written on the command line."""
    case = eval(arguments[0], {"Case": Case})
    verify(case)
    print(f"PASS {case}")


if __name__ == "__main__":
    main(sys.argv[1:])
