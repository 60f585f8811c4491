"""Cases of layer 1 for the batch-norm and pool kernels; `runner` runs them started with TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from resnet_fused import reference
from resnet_fused.kernels import launch, pool, reduce
from resnet_fused.numerics import judge
from tests.emulation import bn_samples as samples
from tests.emulation.bn_samples import KERNELS, SHAPES, Results, Sample
from tests.emulation.interpreter import checked

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Make = Callable[..., Sample]


@contextlib.contextmanager
def few_programs_and_poisoned_outputs() -> Iterator[None]:
    """Four programs in all, so that each reduces several tiles, and short strips; new tensors are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        with mock.patch.object(reduce, "PROGRAMS", 4), mock.patch.object(pool, "STRIP", 3):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_counted(sample: Sample, order_seed: int | None, memory_format: torch.memory_format) -> Results:
    """The kernels' results; raises unless every launch moves the bytes that it declares."""
    with few_programs_and_poisoned_outputs(), launch.recording() as records, checked(order_seed) as launches:
        got = sample.run(KERNELS, samples.to_format(memory_format))
    assert len(records) == len(launches) > 0
    for record, seen in zip(records, launches):
        declared = tuple(sum(sides) for sides in zip(*record.bytes.values()))
        counted = tuple(sum(getattr(t, side) for t in seen.traffic.values()) for side in ("read", "written"))
        assert counted == declared, (record, counted)
    return got


def assert_lawful(*every: Sample) -> None:
    """Each under the law; bitwise the same in both memory formats and in another order of programs."""
    for sample in every:
        results = run_counted(sample, None, torch.contiguous_format)
        again = run_counted(sample, 1, torch.channels_last)
        broken = sample.broken(results)
        assert not broken, (broken, {k: None if v is None else v.shape for k, v in sample.inputs.items()})
        for name, t in results.items():
            assert torch.equal(t.nan_to_num(nan=-9.0), again[name].nan_to_num(nan=-9.0)), name
            assert t.ndim < 4 or t.is_contiguous(memory_format=torch.channels_last), name


def shapes_and_dtypes(make: Make, **options: object) -> None:
    """Every shape, the dtypes in turn."""
    assert_lawful(*(make(shape, DTYPES[i % 3], **options) for i, shape in enumerate(SHAPES)))


def case_stats() -> None:
    shapes_and_dtypes(samples.stats)


def case_stats_of_every_dtype() -> None:
    assert_lawful(*(samples.stats((1, 72, 11, 13), dtype) for dtype in DTYPES))


def case_stats_of_a_huge_mean_and_a_tiny_variance() -> None:
    assert_lawful(samples.stats((1, 72, 11, 13), torch.float32, mean=1e4, deviation=1e-2))
    assert_lawful(samples.stats((2, 24, 9, 8), torch.bfloat16, mean=256.0, deviation=1.0))


def case_stats_let_a_nan_and_an_inf_through() -> None:
    y = samples.draw(1, 72, 11, 13)
    y[0, 1, 5, 5], y[0, 2, 10, 12] = float("nan"), float("inf")
    got = run_counted(Sample(samples.stats((1, 1, 1, 1), y.dtype).call, {"y": y}, y.dtype), None, torch.channels_last)
    for name in ("mean", "variance"):
        assert torch.equal(got[name].isfinite(), y.isfinite().all(3).all(2)[0]), name


def case_merge() -> None:
    assert_lawful(samples.merge(2, 5), samples.merge(300, 24), samples.merge(1200, 20))


def case_merge_of_none_and_of_one() -> None:
    one = samples.merge(1, 5)
    assert not one.broken(one.run(KERNELS))
    assert KERNELS.merge_partials(torch.ones(0, 3, 5)).tolist() == torch.zeros(3, 5).tolist()


def case_sum_rows() -> None:
    assert_lawful(samples.sum_of_rows(2, 2, 5), samples.sum_of_rows(300, 2, 24), samples.sum_of_rows(1200, 3, 5))
    assert_lawful(samples.sum_of_rows(7, 9, 3, 40))


def case_sum_rows_of_none_and_of_one() -> None:
    assert reduce.sum_rows(torch.ones(0, 2, 5)).tolist() == torch.zeros(2, 5).tolist()
    assert torch.equal(reduce.sum_rows(samples.draw(1, 2, 5)), samples.draw(1, 2, 5)[0])


def case_finalize() -> None:
    assert_lawful(samples.finalize(24), samples.finalize(5, partials=1), samples.finalize(40, partials=300))


def case_finalize_merges_many_partials_in_stages() -> None:
    sample = samples.finalize(20, partials=1200)
    assert_lawful(sample)
    with checked() as launches:
        sample.run(KERNELS)
    assert [seen.kernel for seen in launches] == ["_merge_partials_kernel", "_bn_finalize_kernel"]


def case_finalize_with_a_cumulative_average() -> None:
    assert_lawful(samples.finalize(24, momentum=None), samples.finalize(40, 300, None))


def case_finalize_without_parts() -> None:
    assert_lawful(samples.finalize(24, drop=("weight", "bias", "conv_bias")))
    assert_lawful(samples.finalize(24, drop=("running_mean", "running_var", "counter", "conv_bias")))
    assert_lawful(samples.finalize(24, drop=("counter",)), samples.finalize(24, drop=("running_mean", "running_var")))


def case_finalize_of_an_empty_batch_moves_only_the_counter() -> None:
    for partials, momentum in ((1, 0.1), (1, None), (3, 0.1)):
        sample = samples.finalize(24, momentum=momentum)
        assert sample.inputs["partials"] is not None
        empty = torch.zeros(partials, 3, 24)
        assert_lawful(Sample(sample.call, {**sample.inputs, "partials": empty}, sample.dtype))
        got = sample.call(KERNELS, {**sample.inputs, "partials": empty, "counter": torch.tensor(4)})
        assert torch.equal(got["running_mean"], sample.inputs["running_mean"])
        assert torch.equal(got["running_var"], sample.inputs["running_var"])
        assert got["counter"].item() == 5


def case_finalize_moves_buffers_of_other_dtypes_and_strides() -> None:
    sample = samples.finalize(24)
    given = {k: None if v is None else v.clone() for k, v in sample.inputs.items()}
    buffers = {"running_mean": torch.zeros(48, dtype=torch.float64)[::2], "running_var": torch.ones(24).bfloat16()}
    want = sample.call(reference, {**given, "counter": torch.tensor(4), **{k: v.clone() for k, v in buffers.items()}})
    got = sample.call(KERNELS, {**given, **buffers})
    for name in buffers:
        assert got[name] is buffers[name]
        dtype = torch.bfloat16 if got[name].dtype == torch.bfloat16 else torch.float32
        assert judge(name, got[name], want[name].double(), [want[name]], dtype).passed, name


def case_eval_moments() -> None:
    assert_lawful(samples.eval_moments(24), samples.eval_moments(130, drop=("weight", "bias", "conv_bias")))


def case_apply() -> None:
    shapes_and_dtypes(samples.apply)
    shapes_and_dtypes(samples.apply, relu=False)


def case_apply_with_a_shortcut() -> None:
    for shortcut in ("plain", "projection"):
        shapes_and_dtypes(samples.apply, shortcut=shortcut)
        assert_lawful(samples.apply((2, 24, 9, 8), torch.bfloat16, shortcut, relu=False))


def case_apply_rounds_z_before_it_adds_the_shortcut() -> None:
    # z is 1 + 2^-10, which rounds to 1 in bfloat16: the shortcut of -1 then leaves exactly 0, as in the stock modules.
    y = torch.ones(1, 8, 2, 2, dtype=torch.bfloat16)
    moments = torch.tensor([0.0, 1.0, 1.0, 2.0**-10, 0.25])[:, None].expand(5, 8).contiguous()
    plain = moments * torch.tensor([1, 1, 1, 0, 1])[:, None]
    for given in ((y, moments, -y, None), (-y, plain, y, moments)):
        want = reference.bn_apply(*given, 1, 0, False)
        assert torch.equal(KERNELS.bn_apply(*given, 1, 0, False), want)


def case_join_sums_the_rounded_gradient() -> None:
    dout = torch.ones(1, 8, 3, 3, dtype=torch.bfloat16)
    moments = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.25])[:, None].expand(5, 8).contiguous()
    given = (dout, dout * 2.0**-10, None, dout, moments, dout, moments)
    for got, want in zip(KERNELS.join_bwd_reduce(*given), reference.join_bwd_reduce(*given)):
        assert torch.equal(got, want)


def case_apply_with_option_a() -> None:
    for dtype in DTYPES:
        assert_lawful(samples.apply((2, 24, 5, 4), dtype, "option_a"), samples.apply((1, 72, 3, 5), dtype, "option_a"))


def case_apply_lets_a_nan_through() -> None:
    for shortcut in ("none", "plain", "projection", "option_a"):
        for dtype in DTYPES:
            assert_lawful(samples.apply((2, 24, 5, 4), dtype, shortcut, specials=True))


def case_bwd_reduce() -> None:
    for options in ({}, {"relu": False}, {"rebuild": True}, {"rebuild": True, "relu": False}):
        shapes_and_dtypes(samples.bwd_reduce, **options)


def case_bwd_reduce_with_a_nan() -> None:
    assert_lawful(*(samples.bwd_reduce((2, 24, 9, 8), d, rebuild=True, specials=True) for d in DTYPES))


def case_join() -> None:
    shapes_and_dtypes(samples.join)
    shapes_and_dtypes(samples.join, drop=("residual_y", "residual_moments"))


def case_join_without_parts() -> None:
    for dtype in DTYPES:
        assert_lawful(samples.join((2, 24, 9, 8), dtype, drop=("dskip", "residual_y", "residual_moments")))
        assert_lawful(samples.join((2, 24, 9, 8), dtype, relu=False), samples.join((2, 5, 3, 3), dtype, specials=True))


def case_bwd_finalize() -> None:
    assert_lawful(samples.bwd_finalize(24), samples.bwd_finalize(130), samples.bwd_finalize(24, training=False))


def case_bwd_apply() -> None:
    for options in ({}, {"relu": False}, {"training": False}, {"training": False, "relu": False}):
        shapes_and_dtypes(samples.bwd_apply, **options)


def case_bwd_apply_keeps_an_inf_out_with_running_statistics() -> None:
    for dtype in DTYPES:
        frozen = samples.bwd_apply((2, 24, 9, 8), dtype, relu=False, training=False, specials=True)
        assert_lawful(frozen, samples.bwd_apply((2, 24, 9, 8), dtype, specials=True))
        assert frozen.run(KERNELS)["dy"].isfinite().all()


# The last but one takes two strips, one below the other.
POOL_SHAPES = ((2, 3, 5, 7), (3, 5, 2, 2), (1, 24, 14, 5), (1, 72, 5, 6))


def case_pool() -> None:
    for backward in (False, True):
        every = enumerate(POOL_SHAPES)
        assert_lawful(*(samples.pooling(s, DTYPES[i % 3], relu=i % 2 == 0, backward=backward) for i, s in every))


def case_pool_windows() -> None:
    windows = (((2, 3), (1, 2), (0, 1)), ((2, 2), (2, 2), (0, 0)), ((3, 3), (1, 1), (1, 1)), ((3, 2), (3, 2), (1, 0)))
    for i, window in enumerate(windows):
        assert_lawful(samples.pooling((1, 5, 5, 6), torch.bfloat16, window, backward=True))
        assert_lawful(samples.pooling((1, 5, 5, 6), torch.bfloat16, window, relu=i % 2 == 0))


def case_pool_of_windows_with_gaps_covers_every_position() -> None:
    sample = samples.pooling((1, 5, 7, 8), torch.float32, ((2, 2), (3, 3), (0, 0)), backward=True)
    with few_programs_and_poisoned_outputs(), checked():
        assert not sample.broken(sample.run(KERNELS))


def case_pool_with_a_nan_and_infinities() -> None:
    for dtype, relu in zip(DTYPES, (True, False, True)):
        assert_lawful(samples.pooling((2, 5, 4, 5), dtype, relu=not relu, specials=True))
        assert_lawful(samples.pooling((2, 5, 4, 5), dtype, relu=relu, specials=True, backward=True))


def case_pool_compares_values_as_rounded() -> None:
    # z is 256 and then 256.5, which are one value in bfloat16: the first wins, though the second is larger.
    y = torch.tensor([0.0, 0.5] * 4, dtype=torch.bfloat16).view(1, 1, 1, 8).expand(1, 8, 1, 8)
    moments = torch.tensor([0.0, 1.0, 1.0, 256.0, 0.25])[:, None].expand(5, 8).contiguous()
    window = ((1, 2), (1, 2), (0, 0))
    dout = torch.ones(1, 8, 1, 4, dtype=torch.bfloat16)
    both = (engine.pool_bwd(dout, y, moments, *window, True) for engine in (KERNELS, reference))
    for got, want in zip(*both):
        assert torch.equal(got, want)


def case_pool_of_minus_infinity_alone_and_of_nans() -> None:
    for value in ("-inf", "nan"):
        sample = samples.pooling((1, 3, 4, 5), torch.float32, relu=False, backward=True)
        full = torch.full((1, 3, 4, 5), float(value))
        assert_lawful(Sample(sample.call, {**sample.inputs, "y": full}, torch.float32))
