"""Our own matrix products on the CPU (`engines.cpu_plan`): the law for every source, geometry and instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused import plan, site
from resnet_fused.calls import SiteParams, Source
from resnet_fused.engines import cpu, cpu_plan, cpu_site
from resnet_fused.numerics import assert_law

from .test_cpu_site import (
    LAST,
    SOURCES,
    Case,
    both,
    forward_arguments,
    image,
    masked,
    outcome,
    parameters,
    seeds,
    site_call,
    source,
)  # fmt: skip

REASON = cpu.load() or (None if cpu_site._site_fwd else "the CPU library is older than its site ops: build it again")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CASES = {
    "1x1": Case((40, 72), 1, 1, 0, image=(13, 17)),
    "1x1 deeper than a block": Case((600, 33), 1, 1, 0, image=(6, 7)),
    "1x1 padded": Case((40, 36), 1, 1, 1, image=(18, 19)),
    "3x3": Case((20, 36), image=(15, 17)),
    "3x3 deeper than a block": Case((72, 33), image=(7, 9)),
    "3x3 stride 2": Case((33, 65), stride=2, image=(13, 14)),
    "3x3 without padding": Case((17, 19), padding=0, image=(20, 16)),
    "5x5 stride 3": Case((16, 48), 5, 3, 1, image=(22, 23)),
    "7x7 stem": Case((3, 64), 7, 2, 3, image=(33, 30)),
    "2x2 stride 2": Case((32, 32), 2, 2, 0, image=(17, 16)),
    "one row": Case((64, 64), image=(1, 40)),
}
PATCHES = {
    "even": Case((32, 48), image=(24, 26)),
    "odd": Case((40, 33), image=(23, 25)),
    "wide": Case((64, 32), padding=2, image=(9, 61)),
    "more filters than patches": Case((72, 136), image=(9, 11)),  # the threads share columns, forward and dgrad
    "rows of the weight": Case((136, 129), image=(17, 18)),  # of which each thread has some in wgrad
}
NARROW = {
    "16 channels": Case((16, 16), image=(15, 37)),
    "32 channels": Case((32, 24), image=(11, 22)),
    "16 channels stride 2": Case((16, 40), stride=2, image=(17, 35)),
    "32 channels stride 2": Case((32, 64), stride=2, image=(10, 12)),
    "16 channels without padding": Case((16, 7), padding=0, image=(21, 29)),
    "a picture": Case((3, 24), image=(17, 35)),
    "a picture stride 2": Case((3, 40), stride=2, padding=0, image=(18, 33)),
    "a picture 7x7": Case((3, 20), 7, 2, 3, image=(21, 34)),
}
BF16_CASES = {
    **CASES,
    **PATCHES,
    **NARROW,
    "1x1 deeper than a block of bfloat16": Case((1100, 33), 1, 1, 0, image=(5, 5)),
}
CHUNKS = Case((132, 130), image=(40, 38))  # patches for wgrad in more than one chunk


@pytest.fixture
def own() -> Iterator[None]:
    """Everything that our products can run, whatever the rules of speed say."""
    with plan.force(plan.OWN):
        yield


def law(case: Case, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    call, x = site_call(case), image(case, 0, dtype)
    assert cpu_plan.packed(call, x, parameters(case, dtype).weight) == cpu_plan.OWN_ALL
    ops, same, ref = (masked(found, kind, case, dtype) for found in both(case, kind, dtype, **options))
    assert ops["rebuilt"].equal(ops["y"])
    assert_law(ops, ref, [same], dtype)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", [*CASES, *PATCHES, *NARROW])
def test_the_law(name: str, kind: str) -> None:
    law({**CASES, **PATCHES, **NARROW}[name], kind)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("kind", ["pending", "projection"])
@pytest.mark.parametrize("name", BF16_CASES)
def test_the_law_in_bfloat16(name: str, kind: str) -> None:
    law(BF16_CASES[name], kind, torch.bfloat16)


@pytest.mark.usefixtures("own")
def test_the_law_in_chunks() -> None:
    law(CHUNKS, "pending")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("options", [{"training": False}, {"momentum": None}], ids=["frozen", "cumulative"])
def test_statistics(options: dict[str, Any]) -> None:
    for case in (CASES["1x1"], PATCHES["odd"]):
        law(case, "pending", **options)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    before = cpu.isa()
    try:
        try:
            cpu.set_isa(isa)
        except RuntimeError as error:
            pytest.skip(f"{isa}: {error}")
        for name in ("1x1 deeper than a block", "3x3 stride 2", "7x7 stem"):
            law(CASES[name], "projection")
        for name in PATCHES:
            law(PATCHES[name], "pending")
    finally:
        cpu.set_isa(before)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_every_time(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in (CASES["1x1"], CASES["3x3 stride 2"], *PATCHES.values(), *NARROW.values()):
            call, src, params = (
                site_call(case),
                source("projection", case, torch.float32),
                parameters(case, torch.float32),
            )
            given = seeds(case, call, src, params)
            first, second = (outcome(call, src, params, given, "ops") for _ in range(2))
            assert [name for name in first if not first[name].equal(second[name])] == []
    finally:
        torch.set_num_threads(before)


def forward(packed: int, x: Tensor, params: SiteParams) -> tuple[Tensor, ...]:
    """``y`` and the moments of a 3x3."""
    given = list(forward_arguments(PATCHES["odd"], "plain"))
    given[0], given[8:15] = x, [None if t is None else t.clone() for t in params]
    y, moments, _, _ = torch.ops.resnet_fused.site_fwd(*given[:-1], packed)
    return y, moments


def results(packed: int, case: Case, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """``y`` of a plain source; and both gradients with ``x`` in its place, of the ``y`` of the direct products."""
    call, params, src = site_call(case), parameters(case, torch.float32), source("plain", case, torch.float32)
    given = seeds(case, call, src, params)
    monkeypatch.setattr(cpu_site, "packed", lambda *_: 1)
    direct = site.site_forward(call, src, params)
    monkeypatch.setattr(cpu_site, "packed", lambda *_: packed)
    y = site.site_rebuild(call, src, params.weight)
    other = src._replace(y=x)
    grads = site.site_backward(call, other, x, params[:4], direct.y, direct.moments, *given, (True, True))
    assert grads.source is not None and grads.weight is not None
    return {"y": y, "source": grads.source, "weight": grads.weight}


@pytest.mark.parametrize("name", ["odd", "rows of the weight"])
def test_winograd_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = PATCHES[name]
    direct, by_patches = (
        results(packed, case, image(case, 0, torch.float32), monkeypatch) for packed in (1, cpu_plan.OWN_ALL)
    )
    assert [name for name in direct if direct[name].equal(by_patches[name])] == []


@pytest.mark.skipif(cpu_plan.isa() in ("baseline", "avx2"), reason="only AVX-512 sums few channels directly")
def test_few_channels_are_not_winograd_s(monkeypatch: pytest.MonkeyPatch) -> None:
    case = NARROW["16 channels"]
    x = image(case, 0, torch.float32)
    direct, allowed = (results(packed, case, x, monkeypatch) for packed in (1, cpu_plan.OWN_ALL))
    assert [name for name in direct if not direct[name].equal(allowed[name])] == []


@pytest.mark.parametrize("name", [*PATCHES, *NARROW])
def test_what_was_in_memory_before_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {**PATCHES, **NARROW}[name]
    x = image(case, 0, torch.float32)
    first = results(cpu_plan.OWN_ALL, case, x, monkeypatch)
    results(cpu_plan.OWN_ALL, case, torch.full_like(x, float("nan")), monkeypatch)
    second = results(cpu_plan.OWN_ALL, case, x, monkeypatch)
    assert [name for name in first if not first[name].equal(second[name])] == []


@pytest.mark.parametrize("name", ["odd", "rows of the weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=["nan", "inf", "nearly inf"])
def test_a_weight_gradient_that_is_not_finite(value: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the taps and channels that meet the value are not."""
    case = PATCHES[name]
    x = image(case, 0, torch.float32)
    x[1, 3, 0, :2] = value
    direct, by_patches = (results(packed, case, x, monkeypatch)["weight"] for packed in (1, cpu_plan.OWN_ALL))
    assert torch.equal(direct.nan_to_num(7.0, 8.0, 9.0), by_patches.nan_to_num(7.0, 8.0, 9.0))
    assert direct[:, :3].isfinite().all()
    assert not direct[:, 3].isfinite().all() or value == 3e38


@pytest.mark.parametrize("name", ["16 channels", "a picture", "a picture stride 2", "a picture 7x7"])
def test_zeros_beside_a_gradient_do_not_spread_a_nan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = NARROW[name]
    x = image(case, 0, torch.float32)
    x[1, 2, 0, :2] = float("nan")
    own, library = (results(bits, case, x, monkeypatch)["weight"] for bits in (cpu_plan.OWN_ALL, cpu_plan.OWN_NONE))
    assert own.isfinite().equal(library.isfinite()) and own[:, 2].isfinite().any() and own[:, :2].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=["nan", "inf", "nearly inf"])
def test_winograd_gives_way_where_results_are_not_finite(value: float) -> None:
    """A patch would spread it to neighbours that the filter does not reach."""
    case = PATCHES["odd"]
    x, params = image(case, 0, torch.float32), parameters(case, torch.float32)
    x[1, 3, 6, 6] = value
    direct, by_patches = (forward(packed, x, params) for packed in (1, cpu_plan.OWN_ALL))
    for a, b in zip(direct, by_patches, strict=True):
        assert torch.equal(a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0))
    assert not direct[0][0].isnan().any()  # the other image's results are what they were


def test_a_gradient_of_another_shape_is_refused() -> None:
    case = CASES["3x3"]
    call, src, params = site_call(case), source("plain", case, torch.float32), parameters(case, torch.float32)
    g, sums, _ = seeds(case, call, src, params)
    with plan.force(plan.OWN), pytest.raises(RuntimeError, match=r"site_bwd: g: expected shape \(2, 36, 15, 17\)"):
        cpu_site.site_backward(
            cpu, call, src, src.y, params[:4], g, sums.new_ones(5, 36), g[:, :, 1:], sums, None, (True, True)
        )


@pytest.mark.usefixtures("own")
def test_an_input_that_is_not_channels_last() -> None:
    case = CASES["3x3"]
    call, params = site_call(case), parameters(case, torch.float32, last=False)
    src = source("plain", case, torch.float32)
    given = seeds(case, call, src, params)
    strided = Source("plain", src.y.contiguous())
    assert not strided.y.is_contiguous(memory_format=LAST)
    first, second = (outcome(call, s, params, given, "ops") for s in (src, strided))
    assert [name for name in first if not first[name].equal(second[name])] == []
