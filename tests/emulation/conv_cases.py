"""Cases of layer 1 for the convolution kernels; `runner` runs them started with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from triton.runtime.errors import InterpreterError

from resnet_fused.compiling.catalogue import DTYPES, allow_tf32
from resnet_fused.kernels import conv_dgrad, conv_fwd, conv_wgrad, launch, pack, tiles
from tests.emulation import planted_convs
from tests.emulation.bn_cases import few_programs_and_poisoned_outputs
from tests.emulation.bn_samples import Results, to_format
from tests.emulation.conv_gradients import input_gradient, weight_gradient
from tests.emulation.conv_samples import KERNELS, Conv, ConvSample, Pick, bits, chosen, forward, in_parts
from tests.emulation.interpreter import checked
from tests.emulation.interpreter_memory import KernelMemoryError, Launch

Make = Callable[[torch.dtype], ConvSample]
FORMATS = {None: torch.contiguous_format, 1: torch.channels_last}
RAGGED = 0.02  # of the bytes read, where a row of pixels is in no window
UNREAD = 1.0  # where taps or pixels are padding
CONV = Conv(2, 24, 9, 8, 40, 3, 1, 1)


def run(
    sample: ConvSample, order_seed: int | None, pick: Pick = tiles.choose, engine: Any = KERNELS
) -> tuple[Results, list[launch.LaunchRecord], list[Launch]]:
    """The kernels' results, and each launch as declared and as seen."""
    recorded = launch.recording()
    with few_programs_and_poisoned_outputs(), chosen(pick), recorded as records, checked(order_seed) as launches:
        got = sample.run(engine, to_format(FORMATS[order_seed]))
    assert len(records) == len(launches) > 0
    return got, records, launches


def bytes_off(records: list[launch.LaunchRecord], launches: list[Launch], ragged: float) -> list[str]:
    """The launches that do not move the bytes they declare: read within ``ragged``, each element written once."""
    off = []
    for record, seen in zip(records, launches):
        read, written = (sum(sides) for sides in zip(*record.bytes.values()))
        # A table of moments is declared whole, and read by the rows that are needed.
        whole = sum(t.length * t.itemsize - t.traffic().read for t in seen.tensors if "moments_ptr" in t.name)
        moved = seen.traffic.values()
        stored = {sum(t.written for t in moved), sum(t.requested_written for t in moved)}
        if abs(read - whole - sum(t.read for t in moved)) > ragged * read or stored != {written}:
            off.append(f"{record.kernel}: read {read}, written {written} declared, {seen.traffic}")
    return off


def hold(make: Make, dtype: str, ragged: float = 0.0, pick: Pick = tiles.choose) -> list[Launch]:
    """Under the law in both weight formats, bitwise the same in any order of programs, and with the bytes declared."""
    of, tf32 = DTYPES[dtype]
    with allow_tf32(tf32):
        sample = make(of)
        got, records, launches = run(sample, None, pick)
        wrong = sample.broken(got) + bytes_off(records, launches, ragged)
        assert not wrong, wrong
        other, *counts = run(sample, 1, pick)
        wrong = bytes_off(*counts, ragged)
        assert not wrong, wrong
    for name, t in got.items():
        assert torch.equal(t.nan_to_num(nan=-9.0), other[name].nan_to_num(nan=-9.0)), name
        assert name not in ("y", "dx", "out") or t.is_contiguous(memory_format=torch.channels_last), name
    return launches


def case_forward_reads_and_writes_each_element_once() -> None:
    hold(lambda d: forward(Conv(1, 24, 9, 8, 72, 3, 1, 1), d, "pending", "statistics"), "bf16")
    hold(lambda d: forward(Conv(3, 40, 5, 7, 24, 1), d, "plain", "residual"), "fp16")
    hold(lambda d: forward(Conv(1, 72, 6, 5, 24, 1, 2), d, "pending", relu=False), "fp32")
    hold(lambda d: forward(Conv(2, 24, 5, 7, 16, 3, 1, 1), d, "plain", "statistics", step=2), "tf32")


def case_forward_over_pixels_that_no_tap_reads() -> None:
    hold(lambda d: forward(Conv(2, 8, 13, 13, 24, 5, 2, 2, 1), d, "pending", "statistics"), "bf16", RAGGED)
    hold(lambda d: forward(Conv(1, 24, 1, 1, 16, 3, 1, 1), d, "pending", "statistics"), "fp32", UNREAD)


def case_a_join_stores_its_activation_once_everywhere() -> None:
    convs = (Conv(1, 40, 5, 6, 136, 1), Conv(1, 24, 5, 6, 72, 3, 1, 1), Conv(1, 24, 7, 6, 72, 3, 2, 1))
    for conv, source, dtype in zip(convs, ("identity", "projection", "identity"), ("bf16", "fp32", "fp16")):
        launches = hold(lambda d, c=conv, s=source: forward(c, d, s, "statistics"), dtype)
        out = launches[-1].traffic["out_ptr"]
        assert out.written == out.requested_written == conv.n * conv.c * conv.h * conv.w * DTYPES[dtype][0].itemsize


def case_an_image_is_packed() -> None:
    conv = Conv(2, 3, 13, 11, 24, 7, 2, 3)
    hold(lambda d: forward(conv, d, "plain", "statistics"), "bf16")
    hold(lambda d: forward(Conv(1, 3, 6, 5, 16, 3, 1, 1), d), "fp16")
    hold(lambda d: weight_gradient(conv, d, "batch", "plain", master=torch.float32), "bf16", UNREAD, in_parts(2))


def case_input_gradient_reads_and_writes_each_element_once() -> None:
    hold(lambda d: input_gradient(Conv(2, 24, 9, 8, 40, 3, 1, 1), d, "batch", "pending"), "bf16")
    hold(lambda d: input_gradient(Conv(2, 72, 5, 7, 24, 1), d, "batch", "join", dskip=True, projection=True), "fp16")
    hold(lambda d: input_gradient(Conv(1, 8, 6, 5, 24, 3, 1, 1), d, "none", dskip=True, skip_stride=2), "fp32")
    hold(lambda d: input_gradient(Conv(1, 24, 5, 7, 16, 3, 2, 1), d, "batch", "join", packed=True), "bf16")


def case_input_gradient_by_parity_class() -> None:
    hold(lambda d: input_gradient(Conv(2, 24, 9, 7, 40, 3, 2, 1), d, "batch", "pending"), "bf16")
    hold(lambda d: input_gradient(Conv(2, 16, 5, 7, 24, 1, 2), d, "running", dskip=True), "fp16")
    hold(lambda d: input_gradient(Conv(1, 8, 10, 8, 16, (3, 5), (3, 2), (1, 2)), d, "none"), "fp32")
    hold(lambda d: input_gradient(Conv(1, 8, 9, 8, 16, 3, 2, 2, 2), d, "batch", "join", relu=False), "bf16")


def case_weight_gradient_in_parts() -> None:
    hold(lambda d: weight_gradient(Conv(1, 24, 9, 8, 72, 3, 1, 1), d, "batch", "pending"), "bf16", pick=in_parts(3))
    hold(lambda d: weight_gradient(Conv(3, 72, 8, 7, 24, 1, 2), d, "running"), "fp16", pick=in_parts(2))
    hold(lambda d: weight_gradient(Conv(1, 8, 9, 8, 16, 3, 2, 1), d, "none", step=2), "fp32", pick=in_parts(5))


def case_a_mask_is_packed() -> None:
    x = torch.randn(2, 24, 5, 7, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    x = torch.where(x <= 0, 0.0, x)
    x[0, 3, 1, 2] = float("nan")
    with launch.recording() as records, checked(1) as launches:
        mask = pack.pack_mask(x)
    assert torch.equal(mask, bits(x))
    assert not bytes_off(records, launches, 0.0)
    assert pack.pack_mask(x[:, :20]) is None


def caught(module: ModuleType, old: str, new: str, make: Make, pick: Pick = tiles.choose) -> str:
    """What finds the bug: the message of a bad access, or "law" and "bytes"."""
    sample = make(torch.bfloat16)
    try:
        got, *counts = run(sample, 1, pick, planted_convs.engine(module, old, new))
    except InterpreterError as error:
        cause: BaseException | None = error
        while isinstance(cause, InterpreterError):
            cause = cause.__cause__
        assert isinstance(cause, KernelMemoryError), error
        return str(cause)
    return " ".join(["law"] * bool(sample.broken(got)) + ["bytes"] * bool(bytes_off(*counts, UNREAD)))


def _statistics(dtype: torch.dtype) -> ConvSample:
    return forward(CONV, dtype, "pending", "statistics")


def _identity(dtype: torch.dtype) -> ConvSample:
    return forward(CONV, dtype, "identity")


def _pending_gradient(dtype: torch.dtype) -> ConvSample:
    return input_gradient(CONV, dtype, "batch", "pending")


def _pending_weight(dtype: torch.dtype) -> ConvSample:
    return weight_gradient(CONV, dtype, "batch", "pending")


def case_planted_row_masks() -> None:
    beyond = caught(conv_fwd, "offs_npq < NPQ", "offs_npq <= NPQ", _statistics)
    assert beyond.startswith("out-of-bounds store on y_ptr"), beyond
    assert caught(conv_dgrad, "offs_row < ROWS)", "offs_row <= ROWS)", _pending_gradient) == "law bytes"
    beyond = caught(conv_wgrad, "row < last", "row <= last", _pending_weight, in_parts(3))
    assert beyond.startswith("out-of-bounds load on g_ptr"), beyond


def case_planted_activation_in_the_padding() -> None:
    where = "x = tl.where(mask_x, z, 0.0).to(x.dtype)"
    assert caught(conv_fwd, where, "x = z.to(x.dtype)", _statistics) == "law"
    assert caught(conv_wgrad, where, "x = z.to(x.dtype)", _pending_weight) == "law"


def case_planted_swapped_strides() -> None:
    conv = Conv(2, 24, 6, 10, 40, 3, (1, 2), 1)
    assert caught(conv_fwd, "h0 = p * STRIDE_H", "h0 = p * STRIDE_W", lambda d: forward(conv, d)) == "law"
    swapped = ("r * DIL_H) // STRIDE_H", "r * DIL_H) // STRIDE_W")
    assert caught(conv_dgrad, *swapped, lambda d: input_gradient(conv, d, "none")) == "law"
    swapped = ("% P * STRIDE_H", "% P * STRIDE_W")
    assert caught(conv_wgrad, *swapped, lambda d: weight_gradient(conv, d, "none")) == "law"


def case_planted_activation_stored_by_every_tile_of_k() -> None:
    found = caught(
        conv_fwd,
        "owner = (pid_k == 0) & owner_h",
        "owner = owner_h",
        lambda d: forward(Conv(1, 24, 5, 7, 136, 1), d, "identity"),
    )
    assert found.startswith("race on out_ptr") and found.endswith("writes an element that another program wrote"), found


def case_planted_activation_stored_by_the_wrong_tap() -> None:
    assert caught(conv_fwd, "& owner_h & owner_w", "& owner_h & (s == 0)", _identity) == "law bytes"


def case_planted_mask_bits() -> None:
    stored = caught(
        conv_fwd, "tile * (CHANNELS // 8)", "0 * tile", lambda d: forward(Conv(1, 72, 5, 6, 24, 1), d, "identity")
    )
    assert stored == "law bytes"
    inverted = ("BLOCK_C) > 0, acc", "BLOCK_C) == 0, acc")
    joined = Conv(1, 24, 5, 7, 16, 1)
    assert caught(conv_dgrad, *inverted, lambda d: input_gradient(joined, d, "none", "join", packed=True)) == "law"


def case_planted_parity_classes() -> None:
    conv = Conv(2, 24, 9, 7, 40, 3, 2, 1)
    dropped, tap = ("tile.cols), classes)", "tile.cols), classes - 1)"), ("(parity + PAD -", "(parity + PAD + 1 -")
    assert caught(conv_dgrad, *dropped, lambda d: input_gradient(conv, d, "none")) == "law bytes"
    assert caught(conv_dgrad, *tap, lambda d: input_gradient(conv, d, "none")) == "law"


def case_planted_part_that_is_left_out() -> None:
    assert caught(conv_wgrad, "range(SPLIT)", "range(SPLIT - 1)", _pending_weight, in_parts(3)) == "law"
