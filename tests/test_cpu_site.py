"""A site as one op on the CPU, held to `engines.library`, its specification, over the same primitives."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from resnet_fused import plan, reference, site
from resnet_fused.calls import SiteCall, SiteGrads, SiteParams, Skip, Source
from resnet_fused.engines import cpu, cpu_plan, cpu_site, library
from resnet_fused.numerics import assert_law

REASON = cpu.load() or (None if cpu_site._site_fwd else "the CPU library is older than its site ops: build it again")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
LAST = torch.channels_last


class Case(NamedTuple):
    """Channels in and out, filter, stride, padding, dilation, groups, image."""

    channels: tuple[int, int] = (6, 4)
    side: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    image: tuple[int, int] = (5, 4)


SMALL = {
    "1x1": Case(side=1, padding=0),
    "1x1 stride 2": Case(side=1, padding=0, stride=2),
    "1x1 padded": Case(side=1),
    "3x3": Case(),
    "3x3 stride 2": Case(stride=2),
    "3x3 dilation 2": Case(dilation=2, padding=2),
    "3x3 one channel, one pixel": Case(channels=(1, 1), image=(1, 1)),
    "5x3 groups 2": Case(groups=2, padding=2, side=5),
}
LARGE = {
    "1x1 large": Case((64, 64), 1, 1, 0, image=(14, 14)),
    "3x3 large": Case((32, 32), image=(14, 14)),
}


def image(case: Case, seed: int, dtype: torch.dtype, channels: int | None = None, size: Any = None) -> Tensor:
    shape = (2, channels or case.channels[0], *(size or case.image))
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype).contiguous(memory_format=LAST)


def vector(channels: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def table(channels: int, seed: int, dtype: torch.dtype) -> Tensor:
    rows = [vector(channels, seed + i, torch.float64) for i in range(4)]
    return torch.stack([*rows, torch.full((channels,), 0.05, dtype=torch.float64)]).to(reference.opmath(dtype))


def source(kind: str, case: Case, dtype: torch.dtype) -> Source:
    c, (h, w) = case.channels[0], case.image
    x, m = image(case, 0, dtype), table(c, 10, dtype)
    return {
        "plain": lambda: Source("plain", x),
        "pending": lambda: Source("pending", x, m),
        "pending without relu": lambda: Source("pending", x, m, False),
        "join": lambda: Source("join", x, m, True, Skip("identity"), image(case, 1, dtype)),
        "join without relu": lambda: Source("join", x, m, False, Skip("identity"), image(case, 1, dtype)),
        "join without a shortcut": lambda: Source("join", x, m),
        "projection": lambda: Source(
            "join", x, m, True, Skip("projection"), image(case, 1, dtype), table(c, 20, dtype)
        ),
        "pad": lambda: Source(
            "join", x, m, True, Skip("pad", 2, c - (c + 1) // 2), image(case, 1, dtype, (c + 1) // 2, (2 * h, 2 * w))
        ),
    }[kind]()  # fmt: skip


SOURCES = (
    "plain", "pending", "pending without relu", "join", "join without relu", "join without a shortcut", "projection",
    "pad",
)  # fmt: skip


def site_call(case: Case, training: bool = True, momentum: float | None = 0.1) -> SiteCall:
    pairs = ((n, n) for n in (case.stride, case.padding, case.dilation))
    return SiteCall("cpu", *pairs, case.groups, True, training, momentum, 1e-5)


def parameters(case: Case, dtype: torch.dtype, last: bool = True, bias: bool = True) -> SiteParams:
    c, k = case.channels
    weight = image(case, 2, dtype, c // case.groups, (case.side, case.side))
    weight = weight.new_empty((k, *weight.shape[1:])).copy_(
        torch.randn(k, *weight.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    )
    weight = weight.contiguous(memory_format=LAST if last else torch.contiguous_format)
    conv_bias = vector(k, 3, dtype) if bias else None
    running = (vector(k, 6, dtype), vector(k, 7, dtype).square() + 0.5, torch.tensor(2))
    return SiteParams(weight, conv_bias, vector(k, 4, dtype), vector(k, 5, dtype), *running)


def widened(value: Any) -> Any:
    """A copy with every float tensor in a (named) tuple in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, tuple):
        made = [widened(v) for v in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value


def copied(params: SiteParams) -> SiteParams:
    return SiteParams(*(None if t is None else t.clone() for t in params))


def outcome(call: SiteCall, src: Source, params: SiteParams, seeds: tuple[Tensor, ...], run: str) -> dict[str, Tensor]:
    """Forward, rebuild and backward of a site, by the ops (``run`` "ops") or by the library over an engine."""
    params, (g, sums, dskip) = copied(params), seeds
    if run == "ops":
        made = site.site_forward(call, src, params)
        y = site.site_rebuild(call, src, params.weight)
    else:
        engine = {"cpu": cpu, "reference": reference}[run]
        made = library.site_forward(engine, call, src, params)
        y = library.site_rebuild(engine, call, src, params.weight)
    x = src.y if src.kind == "plain" else made.x if src.kind == "join" else None
    skip = dskip if src.kind != "pending" else None
    arguments = (made.y, made.moments, g, sums, skip, (True, True))
    if run == "ops":
        grads = site.site_backward(call, src, x, params[:4], *arguments)
    else:
        grads = library.site_backward(engine, call, src, x, params.weight, *arguments)
    results = {"y": made.y, "moments": made.moments, "rebuilt": y, **named(grads)}
    if src.kind == "join":
        results["x"] = made.x
    results |= {f"buffer {i}": t for i, t in enumerate(params[4:])}
    return {name: t.double() if not t.is_floating_point() else t for name, t in results.items() if t is not None}


def named(grads: SiteGrads) -> dict[str, Tensor | None]:
    return {name: getattr(grads, name) for name in SiteGrads._fields[:5]}


def seeds(case: Case, call: SiteCall, src: Source, params: SiteParams) -> tuple[Tensor, ...]:
    y = library.site_rebuild(reference, call, src, params.weight)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(y.dtype)
    sums = table(case.channels[1], 30, y.dtype)[:2].contiguous()
    return g.contiguous(memory_format=LAST), sums, image(case, 9, y.dtype)


def both(case: Case, kind: str, dtype: torch.dtype, **options: Any) -> tuple[dict[str, Tensor], ...]:
    """Outcomes of the ops, of the library over the same primitives, and in float64."""
    call, src, params = site_call(case, **options), source(kind, case, dtype), parameters(case, dtype)
    given = seeds(case, call, src, params)
    ops, same = (outcome(call, src, params, given, run) for run in ("ops", "cpu"))
    return ops, same, outcome(call, widened(src), widened(params), widened(given), "reference")


def masked(found: dict[str, Tensor], kind: str, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """With the source's gradient behind its ReLU: whoever reads it masks it, so our products may have done that."""
    if kind not in ("pending", "join without a shortcut") or "source" not in found:
        return found
    x, moments = (t.double() for t in source(kind, case, dtype)[1:3])
    mean, _, scale, shift, _ = (row[:, None, None] for row in moments)
    return {**found, "source": found["source"].where(scale * (x - mean) + shift > 0, 0)}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", SMALL)
def test_a_small_site_obeys_the_law(name: str, kind: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        ops, same, ref = (masked(found, kind, SMALL[name], dtype) for found in both(SMALL[name], kind, dtype))
        assert ops["rebuilt"].equal(ops["y"])
        assert_law(ops, ref, [same], dtype)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", LARGE)
def test_a_large_site_is_the_library_s_bit_for_bit(name: str, kind: str) -> None:
    with plan.force(plan.LIBRARY):
        ops, same, _ = both(LARGE[name], kind, torch.float32)
    assert [n for n in same if not ops[n].equal(same[n])] == []


@pytest.mark.parametrize("options", [{"training": False}, {"momentum": None}], ids=["frozen", "cumulative"])
def test_statistics(options: dict[str, Any]) -> None:
    ops, same, ref = both(SMALL["3x3"], "pending", torch.float32, **options)
    assert_law(ops, ref, [same], torch.float32)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", ["1x1", "3x3"])
def test_gradients_have_the_parameters_layout(name: str, last: bool) -> None:
    case, dtype = SMALL[name], torch.float32
    call, src, params = site_call(case), source("plain", case, dtype), parameters(case, dtype, last)
    g, sums, dskip = seeds(case, call, src, params)
    made = site.site_forward(call, src, params)
    grads = site.site_backward(call, src, src.y, params[:4], made.y, made.moments, g, sums, dskip, (True, True))
    assert grads.weight.stride() == params.weight.stride()
    assert grads.gamma.equal(sums[1]) and grads.beta.equal(sums[0])
    assert grads.conv_bias.equal(torch.zeros_like(grads.beta))
    assert made.carrier.shape == sums.shape


def forward_arguments(case: Case, kind: str, training: bool = True, batch: int = 2) -> tuple[Any, ...]:
    src, params = source(kind, case, torch.float32), parameters(case, torch.float32)
    skip, y = src.skip, src.y[:batch]
    numbers = (*[n for n in (case.stride, case.padding, case.dilation) for _ in range(2)], case.groups)
    tensors = (y, src.moments, src.residual, src.residual_moments)
    described = (skip.stride, skip.channel_offset, src.relu, src.kind == "join")
    return (*tensors, *described, *params, *numbers, training, 0.1, 1e-5, cpu_plan.OWN_ALL)


def backward_arguments(case: Case, kind: str, *needs: bool) -> tuple[Any, ...]:
    call, src, params = site_call(case), source(kind, case, torch.float32), parameters(case, torch.float32)
    g, sums, dskip = seeds(case, call, src, params)
    made = site.site_forward(call, src, params)
    x = {"plain": image(case, 0, torch.float32), "pending": None}.get(kind, made.x)
    numbers = (*[n for n in (case.stride, case.padding, case.dilation) for _ in range(2)], case.groups)
    projected = src.residual_moments is not None
    tensors = (src.y, src.moments, src.residual if projected else None, src.residual_moments)
    return (
        *tensors, src.relu, x, dskip if x is not None else None, *params[:4], made.y, made.moments, g, sums,
        *numbers, True, True, *needs, cpu_plan.OWN_ALL,
    )  # fmt: skip


SAMPLES = {
    **{f"site_fwd {kind}": ("site_fwd", forward_arguments, SMALL["3x3"], kind) for kind in SOURCES},
    "site_fwd stride 2": ("site_fwd", forward_arguments, SMALL["3x3 stride 2"], "plain"),
    "site_fwd frozen": ("site_fwd", forward_arguments, SMALL["1x1"], "plain", False),
    "site_fwd empty": ("site_fwd", forward_arguments, SMALL["1x1"], "plain", True, 0),
    "site_fwd large": ("site_fwd", forward_arguments, LARGE["3x3 large"], "pending"),
    "site_fwd one pixel": ("site_fwd", forward_arguments, SMALL["3x3 one channel, one pixel"], "plain"),
    **{
        f"site_bwd {kind}": ("site_bwd", backward_arguments, SMALL["3x3"], kind, True, True)
        for kind in ("plain", "pending", "join", "projection")
    },
    "site_bwd source alone": ("site_bwd", backward_arguments, SMALL["1x1"], "projection", True, False),
    "site_bwd weight alone": ("site_bwd", backward_arguments, SMALL["1x1"], "projection", False, True),
    "site_bwd pending weight alone": ("site_bwd", backward_arguments, SMALL["1x1"], "pending", False, True),
    "site_bwd pending source alone": ("site_bwd", backward_arguments, SMALL["1x1"], "pending", True, False),
    "site_bwd large": ("site_bwd", backward_arguments, LARGE["3x3 large"], "pending", True, True),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    op, make, *rest = SAMPLES[name]
    torch.library.opcheck(getattr(torch.ops.resnet_fused, op).default, make(*rest))


def test_opcheck_of_the_rebuilding_op() -> None:
    given = forward_arguments(SMALL["3x3"], "projection")
    arguments = (*given[:7], given[8], *given[15:22], cpu_plan.OWN_ALL)
    torch.library.opcheck(torch.ops.resnet_fused.site_rebuild.default, arguments)


@pytest.mark.parametrize("size", [(40, 37), (7, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_gradient_of_a_padded_shortcut_is_the_library_s(size: tuple[int, int], stride: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = image(Case(), 0, dtype, 17, size)
        g = image(Case(), 1, dtype, 24, x[:, :, ::stride, ::stride].shape[2:])
        src = Source("join", g, None, True, Skip("pad", stride, 4), x)
        want, got = library.residual_gradient(g, src), torch.ops.resnet_fused.pad_bwd(g, x, stride, 4)
        assert want is not None and got.equal(want) and got.dtype == dtype
        assert torch.ops.resnet_fused.pad_bwd(g.contiguous(), x, stride, 4).equal(want)
    torch.library.opcheck(torch.ops.resnet_fused.pad_bwd.default, (g, x, stride, 4))


def test_a_padded_shortcut_names_what_is_wrong() -> None:
    x, g = image(Case(), 0, torch.float32, 6, (5, 4)), image(Case(), 1, torch.float32, 8, (3, 2))
    with pytest.raises(RuntimeError, match=r"pad_bwd: first: expected channels that g has, got 3"):
        torch.ops.resnet_fused.pad_bwd(g, x, 2, 3)
    with pytest.raises(RuntimeError, match=r"pad_bwd: g: expected shape \(2, 8, 5, 4\), got shape \(2, 8, 3, 2\)"):
        torch.ops.resnet_fused.pad_bwd(g, x, 1, 0)
    with pytest.raises(RuntimeError, match=r"pad_bwd: x: expected float32, got bfloat16"):
        torch.ops.resnet_fused.pad_bwd(g, x.bfloat16(), 2, 0)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(side=5, padding=0, image=(3, 3)), "Kernel size can't be greater than actual input size"),
        (Case(side=3, padding=0, image=(3, 3)), "Expected more than 1 value per channel when training"),
    ],
    ids=["filter", "rows"],
)
def test_what_torch_refuses_is_refused_in_its_words(case: Case, expected: str) -> None:
    params, before = parameters(case, torch.float32), parameters(case, torch.float32)
    alone = Source("plain", image(case, 0, torch.float32)[:1])
    with pytest.raises((RuntimeError, ValueError), match=expected):
        site.site_forward(site_call(case), alone, params)
    assert all(new.equal(old) for new, old in zip(params[4:], before[4:], strict=True))


def test_an_op_names_what_is_wrong() -> None:
    given = list(forward_arguments(SMALL["3x3"], "plain"))
    given[8] = given[8][:, :2]
    with pytest.raises(RuntimeError, match=r"resnet_fused.site_fwd: weight: expected C / groups input channels, got 2"):
        torch.ops.resnet_fused.site_fwd(*given)


def test_a_library_without_the_ops_runs_the_primitives(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL["3x3"]
    call, src, params = site_call(case), source("join", case, torch.float32), parameters(case, torch.float32)
    given = seeds(case, call, src, params)
    for name in ("_site_fwd", "_site_rebuild", "_site_bwd"):
        monkeypatch.setattr(cpu_site, name, None)
    ops, same = (outcome(call, src, params, given, run) for run in ("ops", "cpu"))
    assert [n for n in same if not ops[n].equal(same[n])] == []
