"""Which convolutions on the CPU run as our own matrix products (`engines.cpu_plan`): by rule, and as measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from resnet_fused import cifar_resnet, eager_blocks, plan, winners
from resnet_fused.engines import cpu, cpu_plan, cpu_site
from resnet_fused.tuning import candidates, sites, steps

from .test_cpu_site import LAST, Case, image, parameters, site_call

REASON = cpu.load() or (None if cpu_site._site_fwd else "the CPU library is older than its site ops: build it again")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CASE = Case((32, 48), image=(24, 26))
REFUSED = {
    "groups": ({"groups": 2}, "2 groups"),
    "dilation": ({"dilation": (2, 2)}, "a dilation of 2"),
    "steps": ({"filter": (1, 1), "stride": (2, 2)}, "it steps over pixels"),
    "dtype": ({"dtype": torch.float16}, "our products are of float32 and bfloat16, not float16"),
    "small": ({"h": 4, "w": 4}, "so small that it runs as one matrix product in its site's op"),
}
SHAPE = plan.ConvShape(2, 32, 28, 28, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1, torch.float32, False)


@pytest.mark.parametrize("why", REFUSED)
def test_what_they_cannot_run_is_the_library_s(why: str) -> None:
    changes, reason = REFUSED[why]
    found = cpu_plan.variant(dataclasses.replace(SHAPE, **changes))
    assert found.name != plan.OWN and found.reason == reason


SLOWER = {
    "one image of few points": (
        {"n": 1, "c": 512, "h": 4, "w": 4, "k": 512},
        "16 points of one image: packing the weight costs more",
    ),
}


@pytest.mark.skipif(REASON is None and cpu.isa() == "baseline", reason="without AVX2 the library runs everything")
@pytest.mark.parametrize("why", SLOWER)
def test_where_they_are_slower_the_library_runs(why: str) -> None:
    changes, reason = SLOWER[why]
    found = cpu_plan.variant(dataclasses.replace(SHAPE, **changes))
    assert found == plan.Variant(plan.LIBRARY, reason)
    assert cpu_plan.variant(dataclasses.replace(SHAPE, **{**changes, "n": 2})).name == plan.OWN


@pytest.mark.parametrize(
    ("isa", "dtype", "owner"),
    [
        ("avx2", torch.float32, plan.LIBRARY),
        ("avx512", torch.float32, plan.OWN),
        ("avx512", torch.bfloat16, plan.OWN),
        ("amx", torch.float32, plan.OWN),
        ("amx", torch.bfloat16, plan.LIBRARY),
    ],
)
def test_a_narrow_stem_runs_where_there_are_kernels_for_it(
    isa: str, dtype: torch.dtype, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_plan, "isa", lambda: isa)
    stem = dataclasses.replace(SHAPE, c=3, k=16, dtype=dtype)
    assert cpu_plan.variant(stem).name == owner
    assert cpu_plan.variant(dataclasses.replace(stem, k=17)).name == plan.OWN


def test_what_was_measured_decides() -> None:
    case = CASE
    call, params = site_call(case), parameters(case, torch.float32)
    x = image(case, 0, torch.float32)
    key = plan.problem_key(plan.shape_of_call(call, x, params.weight), "cpu")
    found = {}
    for choice in (plan.LIBRARY, plan.OWN):
        with winners.using({key: winners.Winner(choice, "measured")}):
            found[choice] = cpu_plan.packed(call, x, params.weight)
    assert found == {plan.LIBRARY: cpu_plan.OWN_NONE, plan.OWN: cpu_plan.OWN_ALL}


def test_they_are_raced_against_the_library() -> None:
    torch.manual_seed(0)
    block = eager_blocks.BasicBlock(32, 32).to(memory_format=LAST)
    images = torch.randn(4, 32, 20, 20).contiguous(memory_format=LAST)
    (problem,) = sites.collect(steps.Step(steps.private_copy(block, None, "cpu"), (images,)))
    assert sorted(candidates.variants(problem)) == sorted([plan.OWN, plan.LIBRARY])


def test_tune_does_not_refuse_them_where_a_stem_is_a_block_s_shortcut() -> None:
    """Its gradient is masked by our products, and by the library's reader: the law is of what is behind the ReLU."""
    torch.manual_seed(0)
    net = cifar_resnet(8).to(memory_format=LAST)
    images = torch.randn(4, 3, 20, 20).contiguous(memory_format=LAST)
    found = sites.collect(steps.Step(steps.private_copy(net, None, "cpu"), (images,)))
    first = next(problem for problem in found if problem.shape.c == 16 and problem.shape.k == 16)
    (use,) = (use for use in first.uses if use.source.kind == "join" and use.source.skip.kind == "none")
    prepared = [sites.make_inputs(use, first.key, torch.device("cpu"))]
    tried = [candidates.variant(first, name, {}) for name in candidates.variants(first)]
    assert sorted(each.name for each in tried) == sorted([plan.OWN, plan.LIBRARY])
    assert candidates.faults(tried, first, prepared) == {}
