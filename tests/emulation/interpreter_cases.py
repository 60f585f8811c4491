"""Cases of layer 1; `runner` runs them in a process started with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.emulation import demo_kernels, planted_bugs, samples
from tests.emulation.interpreter import checked

LENGTH = 1000


def expect_error(text: str, launch: Callable[[], object]) -> None:
    """Raise AssertionError unless ``launch`` fails, under `checked`, with a KernelMemoryError that says ``text``."""
    try:
        with checked():
            launch()
    except InterpreterError as error:
        assert "KernelMemoryError" in str(error), error
        assert text in str(error), error
    else:
        raise AssertionError(f"not caught: {text}")


def launch_planted(kernel: Callable, x: torch.Tensor, programs: int = 4, length: int = LENGTH) -> torch.Tensor:
    out = torch.zeros(LENGTH)
    kernel[(programs,)](x, out, length, BLOCK=256)
    return out


def assert_lawful_in_every_order(sample: samples.Sample) -> None:
    results = []
    for seed in (None, 1, 2):
        with checked(order_seed=seed):
            results.append(sample[0](*sample[2]))
    assert samples.lawful(sample, results[0])
    assert all(torch.equal(results[0].nan_to_num(), other.nan_to_num()) for other in results)


def case_conv_is_lawful_in_every_order() -> None:
    assert_lawful_in_every_order(samples.conv_sample())


def case_bn_relu_is_lawful_in_every_order() -> None:
    assert_lawful_in_every_order(samples.bn_relu_sample())


def case_channel_sum_is_lawful_in_every_order() -> None:
    assert_lawful_in_every_order(samples.channel_sum_sample())


@triton.jit
def _bfloat16_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x * y)
    tl.store(out_ptr + SIZE + offs, x + y)
    tl.store(out_ptr + 2 * SIZE + offs, tl.where(x > y, -x, tl.abs(y)))
    tl.store(out_ptr + 3 * SIZE + offs, (x.to(tl.float32) * 1.01).to(tl.bfloat16))
    tl.store(out_ptr + 4 * SIZE + offs, tl.maximum(x, y))


def case_bfloat16_arithmetic_is_torch_s_bit_for_bit() -> None:
    size = 1024
    draw = torch.Generator().manual_seed(3)
    x, y = (torch.randn(size, generator=draw).bfloat16() for _ in range(2))
    out = torch.empty(5, size, dtype=torch.bfloat16)
    with checked():
        _bfloat16_kernel[(1,)](x, y, out, SIZE=size)
    expected = (x * y, x + y, torch.where(x > y, -x, y.abs()), (x.float() * 1.01).bfloat16(), torch.maximum(x, y))
    for got, want in zip(out, expected):
        assert torch.equal(got, want), (got, want)


@triton.jit
def _minus(a, b):
    return a - b


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr, tl.reduce(tl.load(x_ptr + tl.arange(0, SIZE)), 0, _minus))


def case_a_reduction_that_is_not_associative_shows() -> None:
    x, out = torch.arange(8.0), torch.zeros(1)
    with checked():
        _reduce_kernel[(1,)](x, out, SIZE=8)
    in_order = x[0] - x[1:].sum()
    assert out.item() != in_order.item()


def case_planted_off_by_one_mask() -> None:
    expect_error("out-of-bounds load", lambda: launch_planted(planted_bugs.off_by_one_mask_kernel, torch.ones(LENGTH)))


def case_planted_off_by_one_mask_of_integers() -> None:
    expect_error("out-of-bounds store", lambda: launch_planted(planted_bugs.integer_mask_kernel, torch.ones(LENGTH)))


def case_planted_unmasked_load() -> None:
    expect_error("out-of-bounds load", lambda: launch_planted(planted_bugs.unmasked_load_kernel, torch.ones(LENGTH)))


def case_planted_missing_other() -> None:
    with checked():
        out = launch_planted(planted_bugs.missing_other_kernel, torch.ones(LENGTH), programs=1, length=100)
        half = launch_planted(planted_bugs.missing_other_kernel, torch.ones(LENGTH).bfloat16(), 1, length=100)
        whole = launch_planted(planted_bugs.missing_other_kernel, torch.ones(LENGTH), programs=1, length=256)
    assert out[0].isnan()
    assert half[0].isnan()
    assert whole[0].item() == 256


def case_planted_swapped_stride_gives_a_wrong_result() -> None:
    sample = samples.conv_sample()
    with checked():
        assert not samples.lawful(sample, demo_kernels.pointwise_conv(*sample[2], swap_strides=True))


def case_planted_swapped_stride_out_of_bounds() -> None:
    _, _, (x, w) = samples.conv_sample(npq=48, c=96)
    expect_error("out-of-bounds load", lambda: demo_kernels.pointwise_conv(x, w, swap_strides=True))


def case_planted_same_element() -> None:
    kernel = planted_bugs.same_element_kernel
    expect_error("one element in one store", lambda: launch_planted(kernel, torch.arange(LENGTH) * 1.0))
    expect_error("another program wrote", lambda: launch_planted(kernel, torch.ones(LENGTH)))


def case_planted_lost_update() -> None:
    expect_error("another program writes", lambda: launch_planted(planted_bugs.lost_update_kernel, torch.ones(LENGTH)))


def case_planted_program_order() -> None:
    def launch() -> None:
        planted_bugs.program_order_kernel[(4,)](torch.ones(4), torch.zeros(4), BLOCK=1)

    expect_error("another program writes", launch)


def case_planted_write_through_another_view_of_the_storage() -> None:
    storage = torch.ones(2 * LENGTH)

    def launch() -> None:
        planted_bugs.block_copy_kernel[(2,)](storage, storage[LENGTH:], 256, BLOCK=256)

    expect_error("another program wrote", launch)


def case_planted_read_between_the_rows_of_a_view() -> None:
    view = torch.zeros(64, 64)[:, :8]
    expect_error("between the rows", lambda: launch_planted(planted_bugs.block_copy_kernel, view, 1, 256))


@triton.jit
def _histogram_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < length
    tl.atomic_add(out_ptr + offs % 64, tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


def case_atomic_updates_are_no_race() -> None:
    with checked():
        out = launch_planted(_histogram_kernel, torch.ones(LENGTH))
    assert out.sum().item() == LENGTH


@triton.jit
def _ticket_kernel(counter_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


def case_order_seed_permutes_the_programs() -> None:
    tickets = {}
    for seed in (None, 1, 2):
        out = torch.full((16,), -1, dtype=torch.int32)
        with checked(order_seed=seed):
            _ticket_kernel[(16,)](torch.zeros(1, dtype=torch.int32), out)
        tickets[seed] = out.tolist()
    assert tickets[None] == list(range(16))
    assert sorted(tickets[1]) == sorted(tickets[2]) == tickets[None]
    assert len({tuple(order) for order in tickets.values()}) == 3


def case_bytes_of_bn_relu_are_the_minimum() -> None:
    _, _, (x, scale, shift) = samples.bn_relu_sample()
    with checked() as launches:
        demo_kernels.bn_relu(x, scale, shift)
    (launch,) = launches
    assert launch.kernel == "_bn_relu_fwd_kernel"
    assert {name: t.read for name, t in launch.traffic.items()} == {
        "x_ptr": x.nbytes,
        "scale_ptr": scale.nbytes,
        "shift_ptr": shift.nbytes,
        "y_ptr": 0,
    }
    assert {name: t.written for name, t in launch.traffic.items() if t.written} == {"y_ptr": x.nbytes}


def case_bytes_of_the_matmul_count_every_reload() -> None:
    npq = c = k = 128
    block = 64
    x, w = (torch.zeros(128, 128, dtype=torch.bfloat16) for _ in range(2))
    with checked() as launches:
        y = demo_kernels.pointwise_conv(x, w, block=(block, block, 32))
    traffic = launches[0].traffic
    assert (traffic["x_ptr"].read, traffic["w_ptr"].read, traffic["y_ptr"].written) == (x.nbytes, w.nbytes, y.nbytes)
    assert traffic["x_ptr"].requested_read == x.nbytes * (k // block)
    assert traffic["w_ptr"].sectors_read == w.nbytes * (npq // block)
    assert traffic["x_ptr"].sectors_read == 2 * c * npq * (k // block)


def case_nothing_is_checked_outside_the_block() -> None:
    storage = torch.ones(2 * LENGTH)
    launch_planted(planted_bugs.unmasked_load_kernel, storage[:LENGTH])
