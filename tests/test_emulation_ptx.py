"""Layer 3 of tests/emulation: compiled PTX executed on CPU tensors, and bugs planted in kernels and in the PTX."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from resnet_fused.compiling import offline
from tests.emulation import demo_kernels, planted_bugs, ptx, ptx_snippets, samples
from tests.emulation.launch import on_ptx

needs_compiler = pytest.mark.skipif(bool(offline.missing_tools()), reason=offline.missing_tools())
TARGETS = ("sm_80", "sm_90")
SAMPLES = {
    "conv": samples.conv_sample,
    "bn_relu": samples.bn_relu_sample,
    "channel_sum": samples.channel_sum_sample,
}
LENGTH = 1000


def remove(pattern: str):
    """An edit that deletes every statement of the PTX that matches; it must match one."""

    def edit(text: str) -> str:
        edited, number = re.subn(rf"(?m)^\s*(@!?%\w+\s+)?{pattern}[^;]*;", "", text)
        assert number, pattern
        return edited

    return edit


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SAMPLES)
def test_compiled_code_is_lawful(name, target):
    sample = SAMPLES[name]()
    with on_ptx(target) as launches:
        got = sample[0](*sample[2])
    assert samples.lawful(sample, got)
    assert len(launches) == 1


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_matmul_has_no_bank_conflicts_and_whole_sectors(target):
    function, _, (x, w) = samples.conv_sample()
    with on_ptx(target) as launches:
        y = function(x, w)
    stats = launches[0].stats
    tiles = -(-x.shape[0] // 64)
    assert stats["global_read_bytes"] == x.nbytes + tiles * w.nbytes
    assert stats["global_written_bytes"] == y.nbytes
    assert stats["global_read_sectors"] * 32 == stats["global_read_bytes"]
    assert stats["shared_cycles"] == stats["shared_ideal_cycles"] > 0
    assert stats["instruction wgmma" if target == "sm_90" else "instruction mma"] > 0


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("block", [(128, 128, 64), (128, 64, 64), (64, 128, 32), (64, 32, 16)])
def test_matmul_of_every_tile_is_lawful(block, target):
    sample = samples.conv_sample(npq=200, c=144, k=136)
    with on_ptx(target):
        got = demo_kernels.pointwise_conv(*sample[2], block=block)
    assert samples.lawful(sample, got)


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (65, 31, 33), (64, 48, 128)])
def test_matmul_of_awkward_shapes_is_lawful(shape, target):
    sample = samples.conv_sample(*shape)
    with on_ptx(target):
        got = sample[0](*sample[2])
    assert samples.lawful(sample, got)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "target", "pattern", "message"),
    [
        ("channel_sum", "sm_80", r"bar\.sync", "shared-memory race"),
        ("conv", "sm_80", r"bar\.sync", "shared-memory race|before it is written"),
        ("conv", "sm_90", r"bar\.sync", "shared-memory race|before it is written"),
        ("conv", "sm_80", r"cp\.async\.wait_group", "cp.async waited for"),
        ("conv", "sm_90", r"cp\.async\.wait_group", "cp.async waited for"),
        ("conv", "sm_90", r"wgmma\.wait_group", "before its wgmma is waited for"),
    ],
)
def test_planted_missing_barrier_or_wait(name, target, pattern, message):
    sample = SAMPLES[name]()
    with pytest.raises(ptx.PTXError, match=message), on_ptx(target, edit=remove(pattern)):
        sample[0](*sample[2])


@needs_compiler
@pytest.mark.parametrize(
    ("target", "message"),
    [("sm_80", "race: read after write by another warp"), ("sm_90", "wgmma reads what was written without a barrier")],
)
def test_planted_wait_without_the_barrier_after_it(target, message):
    sample = samples.conv_sample()

    def edit(text: str) -> str:
        edited, number = re.subn(r"(cp\.async\.wait_group\s+\d+;\s*)bar\.sync\s+0;", r"\1", text)
        assert number
        return edited

    with pytest.raises(ptx.PTXError, match=message), on_ptx(target, edit=edit):
        sample[0](*sample[2])


@needs_compiler
@pytest.mark.parametrize("kernel", ["off_by_one_mask_kernel", "unmasked_load_kernel"])
def test_planted_out_of_bounds(kernel):
    x, out = torch.ones(LENGTH), torch.zeros(LENGTH)
    with pytest.raises(ptx.PTXError, match="global out-of-bounds"), on_ptx():
        getattr(planted_bugs, kernel)[(4,)](x, out, LENGTH, BLOCK=256)


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_planted_swapped_stride_gives_a_wrong_result(target):
    sample = samples.conv_sample()
    with on_ptx(target):
        assert not samples.lawful(sample, demo_kernels.pointwise_conv(*sample[2], swap_strides=True))


@needs_compiler
def test_planted_swizzle_in_the_matrix_descriptor_is_caught():
    sample = samples.conv_sample()

    def other_swizzle(text: str) -> str:
        # The constant of the descriptors' upper half: 1 << 62 asks for 128-byte, 2 << 62 for 64-byte rows.
        constants = sorted(set(re.findall(r"-?\b\d{18,19}\b", text)))
        assert constants
        for constant in constants:
            text = text.replace(constant, str((int(constant) ^ (3 << 62)) & ((1 << 64) - 1)))
        return text

    with pytest.raises(ptx.PTXError, match=r"before it is written|out-of-bounds"), on_ptx("sm_90", edit=other_swizzle):
        sample[0](*sample[2])


@needs_compiler
def test_planted_wgmma_that_does_not_accumulate_gives_a_wrong_result():
    sample = samples.conv_sample()

    def edit(text: str) -> str:
        edited, number = re.subn(r"(wgmma\.mma_async[^;]*, )%p\d+(, 1, 1)", r"\g<1>0\2", text)
        assert number
        return edited

    with on_ptx("sm_90", edit=edit):
        assert not samples.lawful(sample, sample[0](*sample[2]))


@needs_compiler
def test_everything_is_given_back_after_an_error():
    before = (JITFunction.run, driver._active)
    with pytest.raises(ZeroDivisionError), on_ptx():
        raise ZeroDivisionError
    assert (JITFunction.run, driver._active) == before


@needs_compiler
def test_the_target_must_be_one_that_is_modelled():
    sample = samples.bn_relu_sample()
    with pytest.raises(ValueError, match="sm_80 or sm_90, got sm_86"), on_ptx("sm_86"):
        sample[0](*sample[2])


@pytest.mark.parametrize("name", ptx_snippets.INTEGER)
def test_integer_instruction(name):
    code, expected = ptx_snippets.INTEGER[name]
    a = torch.tensor([0, 1, -1, 7, -7, 2**31 - 1, -(2**31), 0x12345678] * 4, dtype=torch.int32)
    b = torch.arange(32, dtype=torch.int32) * 5 - 40
    got = ptx_snippets.run(code, a, b)
    want = [ptx_snippets.wrap(expected(x, y)) for x, y in zip(a.tolist(), b.tolist())]
    assert got.tolist() == want


@pytest.mark.parametrize("name", ptx_snippets.BROKEN)
def test_broken_snippet_is_refused(name):
    code, message = ptx_snippets.BROKEN[name]
    with pytest.raises(ptx.PTXError, match=message):
        ptx_snippets.run(code, torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32), threads=64)


def test_a_loop_with_a_different_trip_count_per_lane():
    counts = torch.arange(32, dtype=torch.int32)
    got = ptx_snippets.run(ptx_snippets.LOOP, counts, counts)
    assert got.tolist() == [n * (n + 1) // 2 for n in counts.tolist()]
