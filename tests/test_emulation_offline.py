"""Layer 2 of tests/emulation: kernels compiled for every target without a GPU, and what the compiler reports."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from resnet_fused.compiling import offline
from tests.emulation import demo_kernels, planted_bugs

pytestmark = pytest.mark.skipif(bool(offline.missing_tools()), reason=offline.missing_tools())

NVIDIA = sorted(offline.MULTIPROCESSOR)
NPQ, C, K = 96, 80, 48


@pytest.fixture(scope="module")
def kernels():
    x = torch.zeros(NPQ, C, dtype=torch.bfloat16)
    with offline.compile_offline() as compiled:
        demo_kernels.pointwise_conv(x, torch.zeros(C, K, dtype=torch.bfloat16))
        demo_kernels.bn_relu(x, torch.ones(C), torch.zeros(C))
        demo_kernels.channel_sum(x)
    return {(kernel.name, kernel.target): kernel for kernel in compiled}


def test_every_launch_is_compiled_for_every_target(kernels):
    names = ("_pointwise_conv_fwd_kernel", "_bn_relu_fwd_kernel", "_channel_sum_kernel")
    assert set(kernels) == {(name, target) for name in names for target in offline.TARGETS}


def test_no_spills_and_within_the_shared_memory_limit(kernels):
    for kernel in kernels.values():
        assert (kernel.spill_loads, kernel.spill_stores, kernel.stack_bytes, kernel.local_bytes) == (0, 0, 0, 0), kernel
        assert kernel.launches, kernel
        assert kernel.registers > 0


@pytest.mark.parametrize("target", offline.TARGETS)
def test_matmul_uses_the_target_s_tensor_cores(kernels, target):
    kernel = kernels["_pointwise_conv_fwd_kernel", target]
    used = {name for name in ("mma", "wgmma", "tcgen05") if getattr(kernel, name)}
    assert used == {{"sm_90": "wgmma", "sm_100": "tcgen05"}.get(target, "mma")}
    assert (kernel.cp_async > 0) == target.startswith("sm_")


@pytest.mark.parametrize("target", NVIDIA)
def test_main_loops_use_128_bit_accesses(kernels, target):
    conv = kernels["_pointwise_conv_fwd_kernel", target]
    assert conv.wide_loads == conv.count("LDG", "LDGSTS"), conv.opcodes
    assert conv.wide_stores == conv.count("STG"), conv.opcodes
    assert kernels["_bn_relu_fwd_kernel", target].wide_stores
    assert kernels["_channel_sum_kernel", target].wide_loads


@pytest.mark.parametrize("target", NVIDIA)
def test_occupancy_is_what_the_resources_allow(kernels, target):
    for kernel in (k for k in kernels.values() if k.target == target):
        blocks = kernel.blocks_per_multiprocessor()
        warps, shared_kib, _ = offline.MULTIPROCESSOR[target]
        assert blocks * kernel.registers * 32 * kernel.num_warps <= 4 * 16384
        assert blocks * kernel.shared_bytes <= shared_kib * offline.KIB
        assert 0 < kernel.occupancy() <= 1
        assert blocks * kernel.num_warps <= warps


def test_occupancy_of_known_resources(kernels):
    # 8 warps of 128 registers each: two blocks fill the register file; 100 KiB of shared memory: two fill sm_90's.
    base = kernels["_pointwise_conv_fwd_kernel", "sm_90"]
    by_registers = offline.dataclasses.replace(base, registers=128, num_warps=8, shared_bytes=0)
    by_shared = offline.dataclasses.replace(base, registers=32, num_warps=4, shared_bytes=100 * offline.KIB)
    assert by_registers.blocks_per_multiprocessor() == 2
    assert by_shared.blocks_per_multiprocessor() == 2
    assert by_registers.occupancy() == 16 / 64


def test_planted_spills_are_reported():
    with offline.compile_offline(["sm_86"]) as compiled:
        planted_bugs.register_hog_kernel[(1,)](torch.zeros(2, 128, 128), torch.zeros(128, 128), BLOCK=128, num_warps=1)
    assert compiled[0].spill_loads > 0
    assert compiled[0].spill_stores > 0
    assert compiled[0].stack_bytes > 0


def test_planted_excess_of_shared_memory_is_reported():
    x = torch.zeros(128, 256, dtype=torch.bfloat16)
    with offline.compile_offline(["sm_86", "sm_90"]) as compiled:
        demo_kernels.pointwise_conv(x, x.t().contiguous(), block=(128, 128, 64), num_stages=5)
    assert [kernel.launches for kernel in compiled] == [False, True]


def test_planted_odd_row_stride_loses_the_wide_loads():
    x = torch.zeros(NPQ, C, dtype=torch.bfloat16)
    with offline.compile_offline(["sm_80"]) as compiled:
        demo_kernels.pointwise_conv(x, torch.zeros(C, K + 1, dtype=torch.bfloat16)[:, :K])
    assert compiled[0].wide_loads < compiled[0].count("LDG", "LDGSTS")


@triton.jit
def _does_not_compile_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), 0.0)


@triton.autotune([triton.Config({"BLOCK": block}) for block in (128, 256)], key=[])
@triton.jit
def _autotuned_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), 0.0)


def test_a_kernel_that_does_not_compile_raises_and_everything_is_given_back():
    before = (JITFunction.run, Autotuner.run, driver._active)
    with pytest.raises(triton.CompilationError), offline.compile_offline(["sm_80"]):
        _does_not_compile_kernel[(1,)](torch.zeros(8), BLOCK=3)
    assert (JITFunction.run, Autotuner.run, driver._active) == before
    assert not _does_not_compile_kernel.device_caches


def test_every_configuration_of_an_autotuner_is_compiled():
    with offline.compile_offline(["sm_80", "sm_90"]) as compiled:
        _autotuned_kernel[(1,)](torch.zeros(256))
    assert [(kernel.target, kernel.config["BLOCK"]) for kernel in compiled] == [
        ("sm_80", 128),
        ("sm_90", 128),
        ("sm_80", 256),
        ("sm_90", 256),
    ]


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="sm_<number> or gfx9<name>, got 'h100'"), offline.compile_offline(["h100"]):
        pass
