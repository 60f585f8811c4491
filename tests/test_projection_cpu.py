"""The projection on the CPU against its specification, and as PyTorch ops on any device."""

from __future__ import annotations

import inspect
from typing import Any
from unittest import mock

import pytest
import torch

from resnet_fused import projection, reference_projection
from resnet_fused.engines import cpu
from resnet_fused.numerics import assert_law
from tests.projection_cases import CASES, expected, make_inputs, rearranged

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Input shape, K, stride: odd and narrow channels, several panels, one row, no row.
SHAPES = [
    ((2, 19, 9, 7), 37, (2, 2)),
    ((1, 72, 15, 11), 136, (1, 1)),
    ((3, 3, 8, 9), 1, (2, 3)),
    ((1, 8, 1, 1), 8, (2, 2)),
    ((0, 8, 4, 4), 16, (2, 2)),
]
# More than one block of each dimension of the products, of rows and of channels; the last of each is not whole.
BLOCKS = ((2, 600, 18, 30), 1100, (1, 2))
TRAINED = ("train-bias", "dgrad-batch-add", "wgrad-batch-wide-bias")
NAMES = ("projection_fwd", "projection_dgrad", "projection_wgrad")


def check(name: str, shape: tuple[Any, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    inputs = make_inputs(*shape, dtype)
    ref, eager = expected(name, inputs)
    got = CASES[name](projection, rearranged(inputs, layout))
    assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in eager[0].items()}
    # Sums in float64 are as uncertain as the reference's own.
    assert_law(got, ref, eager, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_law(name, dtype):
    for shape in SHAPES:
        check(name, shape, dtype, torch.channels_last)
    check(name, SHAPES[0], dtype, torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_law_on_other_instruction_sets(isa, dtype):
    best = cpu.isa()
    try:
        cpu.set_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        for name in CASES:
            check(name, SHAPES[0], dtype, torch.channels_last)
    finally:
        cpu.set_isa(best)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_products_of_several_blocks(isa):
    best = cpu.isa()
    try:
        cpu.set_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        for name in TRAINED:
            check(name, BLOCKS, torch.float32, torch.channels_last)
        check("infer-block-end", BLOCKS, torch.bfloat16, torch.channels_last)
    finally:
        cpu.set_isa(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_that_are_stored_past_the_caches(dtype):
    check("train", ((2, 8, 20, 15), 8192, (1, 1)), dtype, torch.channels_last)
    for name in ("dgrad-plain", "dgrad-batch-add"):
        check(name, ((2, 64, 201, 190), 8, (2, 2)), dtype, torch.channels_last)


@pytest.mark.parametrize(
    "shape", [((2, 72, 40, 31), 56, (1, 1)), ((1, 64, 9, 8), 640, (1, 1))], ids=["rows", "channels"]
)
def test_threads_and_repeatability(shape):
    inputs = rearranged(make_inputs(*shape, torch.float32), torch.channels_last)
    for name in (*TRAINED, "infer-block-end"):
        torch.set_num_threads(1)
        ref, eager = expected(name, inputs)
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(CASES[name](projection, inputs))
            assert_law(results[-1], ref, eager, torch.float32)
        one, two, three, again = results
        assert all(torch.equal(two[key], again[key]) for key in two)
        if not name.startswith("wgrad"):  # whose parts of the rows are those of the threads
            assert all(torch.equal(one[key], other[key]) for key in one for other in (two, three))


def test_an_infinity_is_in_the_statistics_as_in_torch():
    inputs = make_inputs((2, 16, 8, 8), 8, (1, 1), torch.float32)
    inputs["x"][1, 3, 2, 2] = float("inf")
    ref, eager = expected("train", inputs)
    assert_law(CASES["train"](projection, inputs), ref, eager, torch.float32)


def test_views_of_any_layout():
    inputs = make_inputs((2, 24, 9, 7), 40, (2, 2), torch.bfloat16)
    wider = torch.zeros(2, 24, 9, 15, dtype=torch.bfloat16)
    wider[..., 1:15:2] = inputs["x"]
    for name in ("train", "wgrad-batch"):
        ref, eager = expected(name, inputs)
        assert_law(CASES[name](projection, {**inputs, "x": wider[..., 1:15:2]}), ref, eager, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_the_reference(name):
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (projection, reference_projection))
    assert ours == theirs
    assert "Equivalent to:" in getattr(projection, name).__doc__


def op_samples(dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[Any, ...]]:
    i = rearranged(make_inputs((2, 5, 9, 6), 7, (2, 2), dtype), torch.channels_last)
    table, stride = (i["moments"], i["sums"]), list(i["stride"])
    return {
        "fwd-train": (i["x"], i["weight"], i["bias"], stride, True, None, None, None, False, False),
        "fwd-infer": (
            *(i["x"], i["weight"], None, stride, False),
            *(i["moments"], i["main"], i["main_moments"], True, False),
        ),
        "dgrad": (i["g"], i["y"], i["weight"], *table, [9, 6], stride, i["dx_main"], False),
        "dgrad-plain": (i["g"], None, i["weight"], None, None, [9, 6], stride, None, False),
        "wgrad": (i["g"], i["y"], i["x"], *table, stride, torch.float32, True, False),
        "wgrad-plain": (i["g"], None, i["x"], None, None, stride, dtype, False, False),
    }


@pytest.mark.parametrize("name", op_samples() if REASON is None else [])
def test_opcheck(name):
    op = getattr(torch.ops.resnet_fused, f"projection_{name.split('-')[0]}").default
    torch.library.opcheck(op, op_samples()[name])


def test_fake_kernels_give_the_strides_of_the_real_ones():
    for shape in (((0, 5, 6, 4), 3, (2, 2)), ((2, 5, 1, 1), 1, (1, 1)), ((130, 1, 1, 2), 2, (1, 1))):
        i = make_inputs(*shape, torch.float32)
        args = (i["x"], i["weight"], None, list(i["stride"]), True, None, None, None, False, False)
        torch.library.opcheck(torch.ops.resnet_fused.projection_fwd.default, args)


def test_compiles_in_one_graph():
    i = rearranged(make_inputs((2, 6, 8, 8), 12, (2, 2), torch.float32), torch.channels_last)

    def step(x: torch.Tensor) -> torch.Tensor:
        y, partials = projection.projection_fwd(x * 2, i["weight"], None, (2, 2), True, None, None, None, False)
        dx = projection.projection_dgrad(y, y, i["weight"], i["moments"], i["sums"], (8, 8), (2, 2), x)
        dw, _ = projection.projection_wgrad(y, None, x, i["moments"], None, (2, 2), torch.float32, False)
        return dx.mean() + dw.mean() + partials.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(i["x"]), step(i["x"]))


def bad_calls() -> dict[str, tuple[str, dict[int, Any], str]]:
    """Which sample, what is put in the place of which argument, and the message."""
    y, table = torch.zeros(2, 7, 5, 3, dtype=torch.bfloat16), torch.zeros(5, 7)
    return {
        "rank": ("fwd-train", {0: y[0]}, r"projection_fwd: x: expected shape \(N, C, H, W\).*got shape \(7, 5, 3\)"),
        "dtype": ("fwd-train", {0: y.long()}, "projection_fwd: x: expected float32, .*got int64"),
        "weight": ("fwd-train", {1: y}, r"weight: expected shape \(K, 5, 1, 1\), got shape \(2, 7, 5, 3\)"),
        "weight dtype": ("fwd-train", {1: y.float()}, "weight: expected bfloat16, got float32"),
        "bias": ("fwd-train", {2: torch.zeros(3)}, r"bias: expected shape \(7,\), got shape \(3,\)"),
        "stride": ("fwd-train", {3: [0, 1]}, "stride: expected two integers >= 1, got 0 1"),
        "stats": ("fwd-train", {8: True}, "stats: expected False with moments, add or relu, got True"),
        "moments": ("fwd-infer", {5: table[:4]}, r"moments: expected shape \(5, 7\), got shape \(4, 7\)"),
        "add": ("fwd-infer", {6: y[:1]}, r"add: expected shape \(2, 7, 5, 3\), got shape \(1, 7, 5, 3\)"),
        "no add": ("fwd-infer", {6: None}, "add: expected a tensor, which add_moments belong to, got None"),
        "size of another": ("dgrad", {5: [12, 6]}, r"g: expected shape \(2, 7, 6, 3\), got shape \(2, 7, 5, 3\)"),
        "no y": ("dgrad", {1: None}, "y: expected the stored output, which sums need, got None"),
        "no moments": ("dgrad", {3: None}, "moments: expected a table, which sums need, got None"),
        "dx main": ("dgrad", {7: y}, r"add: expected shape \(2, 5, 9, 6\), got shape \(2, 7, 5, 3\)"),
        "x": ("wgrad", {2: y.float()}, "projection_wgrad: x: expected bfloat16, got float32"),
        "x shape": ("wgrad", {2: y}, r"projection_wgrad: g: expected shape \(2, 7, 3, 2\), got shape \(2, 7, 5, 3\)"),
        "dweight": ("wgrad", {6: torch.float16}, "dtype: expected that of x, or float32, got float16"),
    }


@pytest.mark.parametrize("name", bad_calls() if REASON is None else [])
def test_bad_arguments_are_named(name):
    sample, changed, message = bad_calls()[name]
    args = [changed.get(i, value) for i, value in enumerate(op_samples()[sample])]
    op = getattr(torch.ops.resnet_fused, f"projection_{sample.split('-')[0]}").default
    with pytest.raises(RuntimeError, match=message):
        op(*args)


def test_says_why_it_is_unavailable():
    assert projection.unavailable(torch.device("cpu"), torch.float32) is None
    assert projection.unavailable(torch.device("cpu"), torch.int64) == "no CPU kernels for torch.int64"
    assert projection.unavailable(torch.device("meta"), torch.float32) == "no kernels for meta tensors"
    assert projection.unavailable(torch.device("cuda"), torch.float64) == "no CUDA kernels for torch.float64"
    if not torch.cuda.is_available():
        assert projection.unavailable(torch.device("cuda"), torch.float16)


def test_float32_on_cuda_follows_cudnns_setting_also_when_compiled():
    fake = mock.Mock(is_cuda=True, dtype=torch.float32)
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            assert projection._allows_tf32(fake) == allowed
            assert not projection._allows_tf32(mock.Mock(is_cuda=True, dtype=torch.bfloat16))

            def scaled(x: torch.Tensor) -> torch.Tensor:
                return x * (2 if projection._convolutions_allow_tf32() else 3)

            torch.compiler.reset()
            compiled = torch.compile(scaled, fullgraph=True, backend="eager")
            assert compiled(torch.ones(1)).item() == (2 if allowed else 3)
    finally:
        torch.backends.cudnn.allow_tf32 = before
