"""The Triton engine's operators: schemas and fakes, `torch.compile`, and a whole step without a look at the data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_fused import counting, fuse
from resnet_fused.calls import SiteCall, Skip, Source
from resnet_fused.engines.triton_ops import OPERATORS, flat
from resnet_fused.resnet import BUILDERS

from .engine_harness import (
    CHANNELS,
    OURS,
    bottleneck,
    convolutions,
    fresh_engine,
    fused,
    images,
    needs_compiler,
    running,
)
from .harness import step

__all__ = ["fresh_engine"]
pytestmark = pytest.mark.filterwarnings("error:resnet_fused")
HALF, FLOAT = torch.bfloat16, torch.float32
WINDOW = ((3, 3), (2, 2), (1, 1))
Sample = Callable[[torch.dtype], tuple[Any, ...]]


def _call(
    stride: int = 1, padding: int = 0, groups: int = 1, training: bool = True, momentum: float | None = 0.1
) -> Any:
    return SiteCall("triton", (stride, stride), (padding, padding), (1, 1), groups, True, training, momentum, 1e-5)


def image(
    dtype: torch.dtype, seed: int = 1, batch: int = 2, size: tuple[int, int] = (5, 4), c: int = CHANNELS
) -> Tensor:
    return images(batch, seed, size, c).to(dtype, memory_format=torch.channels_last)


def table(rows: int, seed: int = 2) -> Tensor:
    """Positive, so that it may be moments, statistics or sums."""
    return torch.rand(rows, CHANNELS, generator=torch.Generator().manual_seed(seed)) + 0.1


def vectors(number: int, seed: int = 3) -> list[Tensor]:
    return list(table(number, seed).clone().unbind())


def weight(side: int = 1, groups: int = 1, last: bool = False) -> Tensor:
    shape = (CHANNELS, CHANNELS // groups, side, side)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 0.3
    return made.to(memory_format=torch.channels_last) if last else made


def running_buffers() -> list[Tensor]:
    return [*(v.clone() for v in vectors(2, 5)), torch.tensor(3)]


SOURCES: dict[str, Callable[[torch.dtype], Source]] = {
    "plain": lambda dtype: Source("plain", image(dtype)),
    "pending": lambda dtype: Source("pending", image(dtype), table(5)),
    "join": lambda dtype: Source("join", image(dtype), table(5), True, Skip("identity"), image(dtype, 6)),
    "join without a shortcut": lambda dtype: Source("join", image(dtype), table(5)),
    "projection": lambda d: Source("join", image(d), table(5), True, Skip("projection"), image(d, 6), table(5, 7)),
    "pad": lambda d: Source("join", image(d), table(5), True, Skip("pad", 2, 2), image(d, 6, size=(9, 8), c=4)),
}


def _forward(source: str) -> Sample:
    return lambda dtype: (*flat(_call(), SOURCES[source](dtype)), weight(), None, *vectors(2), *running_buffers())


def _backward(source: str, *needs: bool, side: int = 1) -> Sample:
    def sample(dtype: torch.dtype) -> tuple[Any, ...]:
        _, _, x, mask = OPERATORS["site_forward"](*_forward(source)(dtype))
        x = {"plain": image(dtype), "pending": None}.get(source, x)
        dskip = None if x is None else image(dtype, 9)
        saved = (weight(side, last=side > 1), image(dtype, 10), table(5), image(dtype, 11), table(2))
        described = flat(_call(padding=side // 2), SOURCES[source](dtype))
        return (*described, x, *saved, dskip, mask if mask.numel() else None, *needs)

    return sample


def _odd_forward(call: SiteCall, w: Tensor, **shape: Any) -> Sample:
    return lambda dtype: (*flat(call, Source("plain", image(dtype, **shape))), w, *vectors(3), *running_buffers())


def _infer(residual: bool) -> Sample:
    return lambda d: (
        *flat(_call(training=False)),
        image(d),
        weight(),
        *vectors(5),
        image(d, 6) if residual else None,
        residual,
    )


SITES: dict[str, tuple[str, Sample]] = {
    **{f"forward {source}": ("site_forward", _forward(source)) for source in SOURCES},
    **{f"backward {source}": ("site_backward", _backward(source, True, True)) for source in SOURCES},
    "backward source alone": ("site_backward", _backward("projection", True, False)),
    "backward weight alone": ("site_backward", _backward("projection", False, True)),
    "backward pending source alone": ("site_backward", _backward("pending", True, False)),
    "backward pending weight alone": ("site_backward", _backward("pending", False, True)),
    "backward 3x3": ("site_backward", _backward("plain", True, True, side=3)),
    "forward 3x3, stride 2": ("site_forward", _odd_forward(_call(2, 1), weight(3, last=True))),
    "forward frozen": ("site_forward", _odd_forward(_call(training=False), weight())),
    "forward cumulative": ("site_forward", _odd_forward(_call(momentum=None), weight())),
    "forward one pixel": ("site_forward", _odd_forward(_call(), weight(), size=(1, 1))),
    "forward empty": ("site_forward", _odd_forward(_call(), weight(), batch=0)),
    "forward groups": ("site_forward", _odd_forward(_call(groups=2, padding=1), weight(3, 2))),
    "rebuild": ("site_rebuild", lambda dtype: (*flat(_call(), SOURCES["projection"](dtype)), weight())),
    "infer": ("site_infer", _infer(False)),
    "infer with a shortcut": ("site_infer", _infer(True)),
}
PRIMITIVES: dict[str, tuple[str, Sample]] = {
    "bn_stats": ("bn_stats", lambda d: (image(d),)),
    "bn_finalize": ("bn_finalize", lambda d: (table(9).view(3, 3, -1), *vectors(3), *running_buffers(), 0.1, 1e-5)),
    "bn_eval_moments": ("bn_eval_moments", lambda d: (*vectors(4), None, 1e-5, FLOAT)),
    "bn_apply": ("bn_apply", lambda d: (image(d), table(5), image(d, 6), table(5, 7), 1, 0, True)),
    "bn_bwd_reduce": ("bn_bwd_reduce", lambda d: (image(d, 6), image(d), table(5), True)),
    "bn_bwd_reduce_rebuild": ("bn_bwd_reduce_rebuild", lambda d: (image(d, 6), image(d), table(5), True)),
    "join_bwd_reduce": ("join_bwd_reduce", lambda d: (image(d, 6), None, None, image(d), table(5), None, None)),
    "join_bwd_reduce projection": (
        "join_bwd_reduce",
        lambda d: (image(d, 6), image(d, 7), image(d, 8), image(d), table(5), image(d, 9), table(5, 7)),
    ),
    "bn_bwd_finalize": ("bn_bwd_finalize", lambda d: (table(2), table(5), True)),
    "bn_bwd_finalize frozen": ("bn_bwd_finalize", lambda d: (table(2), table(5), False)),
    "bn_bwd_apply": ("bn_bwd_apply", lambda d: (image(d, 6), image(d), table(5), table(3), True)),
    "pool_apply": ("pool_apply", lambda d: (image(d), table(5), *WINDOW, True)),
    "pool_bwd": ("pool_bwd", lambda d: (image(d, 6, size=(3, 2)), image(d), table(5), *WINDOW, True)),
}
SAMPLES = {**SITES, **PRIMITIVES}


def test_every_operator_has_a_sample():
    assert {op for op, _ in SAMPLES.values()} == set(OPERATORS)


def check_operator(name: str, dtype: torch.dtype, variant: str = "own") -> None:
    op, sample = SAMPLES[name]
    with running(variant):
        torch.library.opcheck(OPERATORS[op], sample(dtype))


@needs_compiler
@pytest.mark.parametrize("name", SAMPLES)
def test_schema_and_fake(name):
    check_operator(name, FLOAT)


@needs_compiler
@pytest.mark.parametrize("name", SITES)
def test_schema_and_fake_of_the_library_variant(name):
    check_operator(name, FLOAT, "library")


@needs_compiler
@pytest.mark.parametrize("name", PRIMITIVES)
def test_schema_and_fake_in_bf16(name):
    check_operator(name, HALF)


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("variant", ["own", "library"])
@pytest.mark.parametrize("name", SITES)
def test_schema_and_fake_of_a_site_in_bf16_with_a_float32_weight(name, variant):
    check_operator(name, HALF, variant)


@needs_compiler
@pytest.mark.parametrize("memory", ["speed", pytest.param("min", marks=pytest.mark.full)])
def test_compiled_is_eager_in_one_graph(memory):
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    model, x = fused(bottleneck(), memory=memory), images()
    torch._dynamo.reset()
    with running() as launches:
        want = step(copy.deepcopy(model), x)
        eager = [launch.kernel for launch in launches]
        launches.clear()
        got = step(torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True), x)
    assert [launch.kernel for launch in launches] == eager and convolutions(launches) == OURS
    assert len(graphs) == 1
    got = {name.removeprefix("_orig_mod."): value for name, value in got.items()}
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)
    assert want["bn1.num_batches_tracked"] == 1


LOOKS_AT_DATA = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique")


class StaysOnTheDevice(TorchDispatchMode):
    """Refuses every operator that looks at data, or has a tensor that is not on the meta device."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operator.overloadpacket.__name__ not in LOOKS_AT_DATA, operator
        out = operator(*args, **(kwargs or {}))
        for t in _pytree.tree_leaves((args, kwargs, out)):
            assert not isinstance(t, Tensor) or t.device.type == "meta", operator
        return out


@pytest.mark.parametrize("network", ["resnet50", "resnet18"])
@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
def test_a_whole_step_never_looks_at_the_data(network, memory):
    model = fuse(counting.on_meta(lambda: BUILDERS[network](fused=False), HALF), engine="triton", memory=memory)
    with StaysOnTheDevice():
        first, second = (counting.count_step(model, counting.meta_images(4, 64, HALF)) for _ in range(2))
    assert first.launches > 100
    assert first.forward.launches == second.forward.launches
    assert first.backward.launches == second.backward.launches


@needs_compiler
def test_the_launches_do_not_depend_on_the_data():
    model, seen = fused(bottleneck()), []
    for x in (images(), torch.zeros_like(images()), images(seed=5) * float("nan")):
        with running() as launches:
            step(copy.deepcopy(model), x)
        seen.append(list(launches))
    assert seen[0] == seen[1] == seen[2] and convolutions(seen[0]) == OURS
