"""The convolution kernels: interpreted, executed as compiled PTX, and compiled within their estimate."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from resnet_fused.compiling import offline
from resnet_fused.compiling.catalogue import DTYPES, allow_tf32
from resnet_fused.kernels import launch, tiles
from resnet_fused.kernels import target as targets
from tests.emulation import ptx, runner
from tests.emulation.bn_samples import to_format
from tests.emulation.conv_gradients import input_gradient, weight_gradient
from tests.emulation.conv_samples import KERNELS, Conv, chosen, forward, in_parts
from tests.emulation.launch import on_ptx
from tests.test_emulation_ptx import remove

needs_compiler = pytest.mark.skipif(bool(offline.missing_tools()), reason=offline.missing_tools())
CASES = "tests.emulation.conv_cases"
TARGETS = ("sm_80", "sm_90")
FORMATS = (torch.channels_last, torch.contiguous_format)


def near(dtype: torch.dtype) -> dict[str, float]:
    """A mean that is huge against the deviation, in units of the dtype's precision."""
    return {"mean": 256.0, "deviation": 1024 * torch.finfo(dtype).eps}


FORWARD = {
    "plain": lambda d: forward(Conv(2, 16, 5, 7, 40, 3, 1, 1), d),
    "pending": lambda d: forward(Conv(1, 24, 9, 7, 40, 3, 2, 1), d, "pending", "statistics"),
    "pending linear": lambda d: forward(Conv(1, 72, 6, 5, 24, 1, 2), d, "pending", relu=False),
    "identity": lambda d: forward(Conv(2, 72, 5, 7, 72, 1), d, "identity", "statistics"),
    "identity strided": lambda d: forward(Conv(1, 24, 7, 6, 16, 3, 2, 1), d, "identity", relu=False),
    "projection": lambda d: forward(Conv(2, 16, 6, 5, 72, 3, 1, 1), d, "projection", "statistics"),
    "residual": lambda d: forward(Conv(2, 8, 5, 4, 24, 3, 1, 1), d, "plain", "residual"),
    "activation linear": lambda d: forward(Conv(1, 24, 5, 7, 40, 1), d, "plain", "activation", relu=False),
    "image 7x7": lambda d: forward(Conv(1, 3, 13, 11, 24, 7, 2, 3), d, "plain", "statistics"),
    "image 3x3": lambda d: forward(Conv(2, 3, 6, 5, 16, 3, 1, 1), d, "plain", "residual"),
    "image dilated": lambda d: forward(Conv(1, 3, 9, 8, 16, 3, 1, 2, 2), d),
    "5x5 dilated": lambda d: forward(Conv(1, 8, 9, 8, 24, 5, 1, 2, 2), d, "pending"),
    "7x7": lambda d: forward(Conv(1, 8, 9, 7, 16, 7, 3, 3), d, "pending", "statistics"),
    "stride 3": lambda d: forward(Conv(1, 24, 10, 9, 72, 3, 3), d, "plain", "statistics"),
    "sides apart": lambda d: forward(Conv(1, 24, 8, 9, 16, (3, 5), (2, 1), (1, 2), (2, 1)), d, "pending"),
    "one pixel": lambda d: forward(Conv(1, 24, 1, 1, 16, 3, 1, 1), d, "pending", "statistics"),
    "view": lambda d: forward(Conv(2, 24, 5, 4, 40, 1), d, "plain", "statistics", step=2),
    "huge mean": lambda d: forward(Conv(1, 8, 9, 8, 24, 1), d, "plain", "statistics", **near(d)),
    "specials": lambda d: forward(Conv(1, 24, 6, 7, 16, 3, 1, 1), d, "pending", "statistics", specials=True),
    "specials join": lambda d: forward(Conv(1, 24, 6, 7, 16, 1), d, "projection", specials=True),
}
INPUT = {
    "plain": lambda d: input_gradient(Conv(2, 16, 5, 7, 40, 3, 1, 1), d, "none"),
    "dskip, no tap": lambda d: input_gradient(Conv(1, 24, 6, 5, 72, 1, 2), d, "running", dskip=True),
    "pending": lambda d: input_gradient(Conv(1, 24, 9, 7, 40, 3, 2, 1), d, "batch", "pending"),
    "pending linear": lambda d: input_gradient(
        Conv(1, 8, 10, 9, 16, 3, 3, 1), d, "batch", "pending", False, relu=False
    ),
    "pending, no tap": lambda d: input_gradient(Conv(1, 24, 9, 8, 16, 3, 2, 2, 2), d, "batch", "pending"),
    "join": lambda d: input_gradient(Conv(2, 72, 5, 7, 24, 1), d, "batch", "join", dskip=True),
    "projection": lambda d: input_gradient(Conv(1, 24, 6, 5, 16, 3, 1, 1), d, "batch", "join", True, True, True),
    "join packed": lambda d: input_gradient(Conv(1, 24, 5, 6, 72, 1), d, "batch", "join", True, True, packed=True),
    "specials packed": lambda d: input_gradient(
        Conv(1, 24, 6, 7, 16, 1), d, "none", "join", specials=True, packed=True
    ),
    "join linear": lambda d: input_gradient(Conv(1, 24, 5, 7, 16, 1), d, "running", "join", relu=False),
    "join strided": lambda d: input_gradient(Conv(1, 24, 7, 6, 16, 1), d, "none", "join", dskip=True, skip_stride=2),
    "5x5": lambda d: input_gradient(Conv(1, 8, 7, 6, 24, 5, 1, 2), d, "running"),
    "7x7": lambda d: input_gradient(Conv(1, 8, 9, 7, 16, 7, 3, 3), d, "batch", mask=False),
    "sides apart": lambda d: input_gradient(Conv(1, 24, 8, 9, 16, (3, 5), (2, 3), (1, 2), (2, 1)), d, "none"),
    "one pixel": lambda d: input_gradient(Conv(1, 24, 1, 1, 16, 3, 1, 1), d, "batch", "pending"),
    "specials": lambda d: input_gradient(Conv(1, 24, 6, 7, 16, 3, 1, 1), d, "batch", "pending", specials=True),
    "specials join": lambda d: input_gradient(Conv(1, 24, 6, 7, 16, 1), d, "none", "join", dskip=True, specials=True),
}
WEIGHT = {
    "plain": lambda d: weight_gradient(Conv(2, 16, 5, 7, 40, 3, 1, 1), d, "none"),
    "pending": lambda d: weight_gradient(Conv(2, 24, 9, 7, 72, 3, 2, 1), d, "batch", "pending"),
    "parts": lambda d: weight_gradient(Conv(2, 24, 11, 13, 16, 1), d, "batch", "pending"),
    "master": lambda d: weight_gradient(Conv(1, 24, 7, 6, 40, 3, 1, 1), d, "running", master=torch.float32),
    "linear": lambda d: weight_gradient(Conv(1, 72, 6, 5, 24, 1, 2), d, "batch", "pending", False, False),
    "image 7x7": lambda d: weight_gradient(Conv(1, 3, 13, 11, 24, 7, 2, 3), d, "batch"),
    "image 3x3": lambda d: weight_gradient(Conv(2, 3, 6, 5, 16, 3, 1, 1), d, "none", master=torch.float32),
    "image dilated": lambda d: weight_gradient(Conv(1, 3, 9, 8, 16, 3, 1, 2, 2), d, "running"),
    "5x5 dilated": lambda d: weight_gradient(Conv(1, 8, 9, 8, 24, 5, 1, 2, 2), d, "batch", "pending"),
    "7x7": lambda d: weight_gradient(Conv(1, 8, 9, 7, 16, 7, 3, 3), d, "running", "pending"),
    "one pixel": lambda d: weight_gradient(Conv(1, 24, 1, 1, 16, 3, 1, 1), d, "none", "pending"),
    "view": lambda d: weight_gradient(Conv(2, 24, 5, 4, 40, 1), d, "batch", step=2),
    "specials": lambda d: weight_gradient(Conv(1, 24, 6, 7, 16, 3), d, "batch", "pending", specials=True),
}
SAMPLES = {
    f"{kernel} {name}": make
    for kernel, group in (("fwd", FORWARD), ("dgrad", INPUT), ("wgrad", WEIGHT))
    for name, make in group.items()
}
# Each once, the dtypes and targets in turn.
QUICK = [(name, tuple(DTYPES)[i % 4], TARGETS[i // 4 % 2]) for i, name in enumerate(SAMPLES)]


@pytest.fixture(scope="module")
def interpreted():
    return runner.run_cases(CASES)


@pytest.mark.parametrize("name", runner.case_names(CASES))
def test_interpreted(interpreted, name):
    assert not interpreted[name], interpreted[name]


@contextlib.contextmanager
def uninitialised_is_nan():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compiled(sample, target, pick=tiles.choose, memory_format=torch.channels_last, edit=None):
    """The results of the compiled kernels."""
    with targets.pretend(target), chosen(pick), uninitialised_is_nan(), on_ptx(target, edit) as launches:
        got = sample.run(KERNELS, to_format(memory_format))
    assert launches
    return got


def assert_lawful(name, dtype, target):
    of, tf32 = DTYPES[dtype]
    pick = in_parts(4) if name == "wgrad parts" else tiles.choose
    with allow_tf32(tf32):
        sample = SAMPLES[name](of)
        assert not sample.broken(compiled(sample, target, pick, FORMATS[list(SAMPLES).index(name) % 3 % 2]))


@needs_compiler
@pytest.mark.parametrize(("name", "dtype", "target"), QUICK)
def test_compiled_kernel_is_lawful(name, dtype, target):
    assert_lawful(name, dtype, target)


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAMPLES)
def test_compiled_kernel_is_lawful_in_every_dtype(name, dtype, target):
    assert_lawful(name, dtype, target)


@needs_compiler
def test_an_infinity_in_y_stays_out_of_running_statistics():
    conv = Conv(1, 24, 6, 7, 16, 3, 1, 1)
    for make in (input_gradient, weight_gradient):
        sample = make(conv, torch.bfloat16, "running", mask=False, specials=True)
        sample.inputs["g"].nan_to_num_(nan=1.0)
        if make is weight_gradient:
            sample.inputs["x"].nan_to_num_(posinf=1.0, neginf=1.0)
        assert not sample.inputs["y"].isfinite().all()
        got = compiled(sample, "sm_80")
        assert not sample.broken(got) and all(t.isfinite().all() for t in got.values())


# The widest tiles need a problem that fills them.
WIDE = {
    "fwd": lambda d: forward(Conv(1, 72, 10, 14, 136, 1), d, "pending", "statistics"),
    "fwd join": lambda d: forward(Conv(1, 40, 10, 14, 72, 3, 1, 1), d, "projection", "statistics"),
    "dgrad": lambda d: input_gradient(Conv(1, 136, 10, 14, 72, 1), d, "batch", "join", dskip=True),
    "dgrad strided": lambda d: input_gradient(Conv(1, 136, 9, 7, 40, 3, 2, 1), d, "batch", "pending"),
    "wgrad": lambda d: weight_gradient(Conv(1, 136, 10, 14, 136, 1), d, "batch", "pending"),
}


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WIDE)
def test_every_candidate_tile_is_lawful(name, dtype, target):
    of, tf32 = DTYPES[dtype]
    with allow_tf32(tf32):
        sample = WIDE[name](of)
        for tile in candidates_of(sample, target)[1]:
            assert not sample.broken(compiled(sample, target, lambda *_, tile=tile: tile)), tile


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["fwd pending", "dgrad pending", "wgrad pending"])
def test_planted_missing_barrier(name, target):
    message = r"race|before it is written|written without a barrier"
    with pytest.raises(ptx.PTXError, match=message):
        compiled(SAMPLES[name](torch.bfloat16), target, edit=remove(r"bar\.sync"))


def candidates_of(sample, target):
    """The product that the sample asks a tile for, and the candidates for it."""
    with targets.pretend(target), chosen(tiles.choose) as asked, launch.recording(run=False):
        sample.run(KERNELS, lambda t: to_format(torch.channels_last)(t).to("meta"))
    ((problem, _),) = asked
    return problem, tiles.candidates(problem, targets.named(target))


def assert_estimated(name, dtype, target, most=None):
    of, tf32 = DTYPES[dtype]
    with allow_tf32(tf32):
        sample = WIDE[name](of)
        problem, found = candidates_of(sample, target)
        for tile in found[:most]:
            assert tiles.shared_bytes(problem, tile) <= targets.named(target).shared_bytes, tile
            with (
                chosen(lambda *_, tile=tile: tile),
                offline.compile_offline([target], wanted=lambda name, _: name.startswith("_conv_")) as kernels,
                launch.recording(compiling=True),
            ):
                sample.run(KERNELS, lambda t: to_format(torch.channels_last)(t).to("meta"))
            (kernel,) = kernels
            assert kernel.shared_bytes <= tiles.shared_bytes(problem, tile), (tile, kernel.shared_bytes)
            assert kernel.launches, tile


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype", "target"),
    [("fwd", "bf16", "sm_90"), ("fwd join", "tf32", "sm_80"), ("dgrad", "bf16", "sm_80"), ("wgrad", "fp16", "sm_90")],
)
def test_the_estimate_of_shared_memory_is_an_upper_one(name, dtype, target):
    assert_estimated(name, dtype, target, most=1)


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WIDE)
def test_the_estimate_of_shared_memory_is_an_upper_one_everywhere(name, dtype, target):
    assert_estimated(name, dtype, target)
