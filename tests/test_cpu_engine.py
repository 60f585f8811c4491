"""The CPU engine against `resnet_fused.reference`, under the numerics law, on every instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from resnet_fused import reference
from resnet_fused.engines import cpu
from resnet_fused.numerics import assert_law
from tests.cpu_cases import CASES, Inputs, make_inputs, rearranged

REASON = cpu.load()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PASSES = [name for name in CASES if not name.startswith(("finalize", "eval", "bwd_finalize"))]
# Narrow, odd and wide C; C that no tile makes whole vectors of; one row; no row.
SHAPES = [
    (2, 1, 5, 7),
    (3, 3, 9, 7),
    (2, 8, 6, 6),
    (1, 16, 5, 3),
    (2, 17, 4, 5),
    (2, 64, 5, 3),
    (3, 130, 3, 4),
    (2, 263, 3, 3),
    (5, 24, 1, 1),
    (1, 7, 1, 1),
    (0, 5, 4, 4),
]


def machine_isas() -> list[str]:
    if REASON is not None:
        return ["baseline"]
    best, names = cpu.isa(), ["baseline"]
    for name in ("avx2", "avx512", "avx512_bf16", "amx"):
        try:
            cpu.set_isa(name)
            names.append(name)
        except RuntimeError:
            continue
    cpu.set_isa(best)
    return names


ISAS = machine_isas()


@pytest.fixture(autouse=True)
def best_isa_afterwards() -> Any:
    yield
    cpu.set_isa(ISAS[-1])


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check_case(name: str, inputs: Inputs, dtype: torch.dtype, isas: Sequence[str] = ISAS) -> None:
    run = CASES[name]
    formats = (torch.contiguous_format, torch.channels_last)
    eager = [run(reference, rearranged(inputs, to_format)) for to_format in formats]
    ref = run(reference, rearranged(inputs, torch.contiguous_format, double=True))
    for isa in isas:
        cpu.set_isa(isa)
        got = run(cpu, rearranged(inputs, torch.channels_last))
        assert {k: t.dtype for k, t in got.items()} == {k: t.dtype for k, t in eager[0].items()}
        # A sum in float64 is as uncertain as the reference's own, so float64 is held to float32's eps;
        # test_float64_is_float64_throughout sees to its digits.
        assert_law(got, ref, eager, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_law(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check_case(name, make_inputs(shape, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_threads_and_repeatability(name: str, dtype: torch.dtype, threads: int) -> None:
    inputs = make_inputs((3, 24, 23, 29), dtype, seed=1)
    check_case(name, inputs, dtype, ISAS[-1:])
    first, second = (CASES[name](cpu, rearranged(inputs, torch.channels_last)) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 9, 9), (4, 3, 31, 31), (2, 700, 3, 3)])
def test_mean_much_larger_than_deviation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype)
    step = torch.finfo(dtype).eps * 1000
    inputs["y"] = (1000 + 1000 * step * torch.randn(shape, dtype=torch.float64).round()).to(dtype)
    check_case("stats", inputs, dtype)


@pytest.mark.parametrize("name", ["stats", "apply-1", "apply-projection-0", "rebuild-1", "bwd_apply-1", "join-111"])
def test_float64_is_float64_throughout(name: str) -> None:
    inputs = make_inputs((2, 19, 9, 5), torch.float64)
    for activation, table in (("y", "moments"), ("residual", "residual_moments")):
        inputs[activation] = inputs[activation] * 1e-7 + 1000
        inputs[table][0] = 1000
        inputs[table][1:3] *= 1e7
    inputs["coef"][1] *= 1e7
    check_case(name, inputs, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["stats", "apply-1", "apply-0", "reduce-1", "rebuild-1", "bwd_apply-1", "join-111"])
def test_nan_and_infinity(name: str, dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 17, 9, 5), dtype)
    for number, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        for key in ("y", "dout", "out"):
            inputs[key][1, 3 + number, 2, 3] = value
    inputs["y"][0, 9, 0, 0], inputs["y"][1, 9, 8, 4] = float("inf"), -float("inf")
    check_case(name, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_ties_and_nan(dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 19, 12, 11), dtype)
    inputs["y"] = inputs["y"].round().clamp(-1, 1)
    inputs["y"][0, 4, 3, 3] = inputs["y"][0, 4, 4, 3] = inputs["y"][1, 18, 0, 0] = float("nan")
    inputs["y"][0, 5] = -float("inf")
    for name in ("pool-0-0", "pool-0-1", "pool-1-0"):
        check_case(name, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_conversions_match_torch_for_every_bit_pattern(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    y = bits.view(dtype).reshape(1, 16, 64, 64).contiguous(memory_format=torch.channels_last)
    for factor in (1.0, 1.0009765625, 0.33333334, 3.1e-5, 7.7e4):
        moments = torch.tensor([0.0, 1.0, factor, 0.0, 1.0])[:, None].expand(5, 16).contiguous()
        expected = (y.float() * factor).to(dtype)
        for isa in ISAS:
            cpu.set_isa(isa)
            got = cpu.bn_apply(y, moments, None, None, 1, 0, False)
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1], ids=hex)
def test_a_nan_of_any_payload_is_stored_as_a_nan(dtype: torch.dtype, bits: int) -> None:
    moments = torch.ones(5, 17)
    moments[2] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for isa in ISAS:
        cpu.set_isa(isa)
        assert cpu.bn_apply(torch.ones(2, 17, 3, 3, dtype=dtype), moments, None, None, 1, 0, True).isnan().all()


@pytest.mark.parametrize("name", PASSES)
def test_any_layout_in_channels_last_out(name: str) -> None:
    inputs = rearranged(make_inputs((3, 6, 9, 7), torch.float32), torch.channels_last)
    expected = CASES[name](cpu, inputs)
    layouts = [
        lambda t: t.contiguous(),
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.repeat_interleave(2, 0)[::2],
    ]
    for layout in layouts:
        got = CASES[name](cpu, {k: layout(t) if t.dim() == 4 else t for k, t in inputs.items()})
        assert all(torch.equal(got[k], expected[k]) for k in expected)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in got.values() if t.dim() == 4)


def test_ambiguous_strides_are_read_right() -> None:
    for shape in ((4, 1, 5, 6), (4, 5, 1, 1), (1, 1, 1, 1)):
        inputs = make_inputs(shape, torch.float32)
        strided = {k: t.contiguous() if t.dim() == 4 else t for k, t in inputs.items()}
        for name in ("stats", "apply-add-1", "rebuild-1", "bwd_apply-1"):
            ours, again = (CASES[name](cpu, i) for i in (strided, rearranged(inputs, torch.channels_last)))
            assert all(torch.equal(ours[k], again[k]) for k in ours)
