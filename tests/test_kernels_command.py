"""The kernel table: what is compiled, what a row says, which bounds are noticed, and `resnet-fused kernels`."""

from __future__ import annotations

import collections
import dataclasses
import json
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from resnet_fused.cli import main
from resnet_fused.compiling import catalogue, offline, table
from resnet_fused.kernels.launch import LaunchRecord
from tests.emulation import demo_kernels, planted_bugs

pytestmark = pytest.mark.skipif(bool(offline.missing_tools()), reason=offline.missing_tools())

TARGETS = ("sm_80", "sm_90")


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def _conv(dtype: torch.dtype = torch.bfloat16, **options) -> None:
    demo_kernels.pointwise_conv(_meta(128, 256, dtype=dtype), _meta(256, 128, dtype=dtype), **options)


def _hog() -> None:
    planted_bugs.register_hog_kernel[(1,)](
        _meta(2, 128, 128, dtype=torch.float32), _meta(128, 128, dtype=torch.float32), BLOCK=128, num_warps=1
    )


@triton.jit
def _does_not_compile_kernel(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), 0.0)


@pytest.fixture(scope="module")
def conv():
    with offline.compile_offline(["sm_90"]) as kernels:
        _conv()
    return kernels[0]


@pytest.mark.parametrize(("target", "core"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("gfx942", "mma")])
def test_a_row_says_what_was_compiled(target, core):
    (row,) = catalogue.compile_step(_conv, target, "bf16", "demo")
    assert (row.kernel, row.target, row.dtype, row.used_by) == ("_pointwise_conv_fwd_kernel", target, "bf16", ("demo",))
    assert (row.config["BLOCK_NPQ"], row.num_warps, row.num_stages) == (64, 4, 3)
    assert (row.tensor_core, row.spills, row.local_bytes, row.broken) == (core, 0, 0, ())
    assert 0 < row.shared_bytes <= row.shared_limit == offline.SHARED_LIMIT[target]
    # Triton stores a bf16 tile of CDNA3's matrix layout 64 bits at a time.
    assert row.wide_loads and row.registers and (row.wide_stores or target == "gfx942")
    assert (row.blocks is None) == (row.occupancy is None) == target.startswith("gfx")
    assert "stride_x_npq" not in row.config


def test_a_planted_spill_breaks_the_bounds():
    rows = catalogue.compile_step(lambda: (_hog(), _conv()), "sm_86", "fp32", "planted")
    assert [row.kernel for row in rows] == ["register_hog_kernel", "_pointwise_conv_fwd_kernel"]
    assert [words.split(" (")[0] for words in rows[0].broken] == ["spills", "local memory"]
    assert rows[1].broken == ()


def test_a_planted_excess_of_shared_memory_breaks_the_bounds():
    (row,) = catalogue.compile_step(lambda: _conv(block=(128, 128, 64), num_stages=5), "sm_86", "bf16", "planted")
    assert len(row.broken) == 1 and row.broken[0].startswith("shared memory over the limit")
    assert row.blocks is None


def test_a_lost_tensor_core_breaks_the_bounds(conv):
    without = dataclasses.replace(conv, opcodes=collections.Counter({"FFMA": 1}))
    assert conv.wants_tensor_core and table.broken_bounds(conv) == ()
    assert table.broken_bounds(without) == ("no tensor core",)


def test_a_block_that_no_multiprocessor_holds_breaks_the_bounds(conv):
    assert table.broken_bounds(dataclasses.replace(conv, registers=255, num_warps=16)) == (
        "no block fits a multiprocessor",
    )


@pytest.mark.parametrize(("precision", "wants"), [("tf32", True), ("ieee", False)])
def test_only_exact_float32_may_do_without_tensor_cores(precision, wants):
    @triton.jit
    def _product_kernel(x_ptr, PRECISION: tl.constexpr):
        offs = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
        x = tl.load(x_ptr + offs)
        tl.store(x_ptr + offs, tl.dot(x, x, input_precision=PRECISION))

    with offline.compile_offline(["sm_80"]) as kernels:
        _product_kernel[(1,)](_meta(64, 64, dtype=torch.float32), PRECISION=precision)
    assert kernels[0].wants_tensor_core == wants == (kernels[0].tensor_core != "none")


def test_a_launch_that_does_not_compile_is_a_row():
    rows = catalogue.compile_step(
        lambda: (_does_not_compile_kernel[(1,)](_meta(8), BLOCK=3), _conv()), "sm_80", "bf16", "planted"
    )
    assert [bool(row.broken) for row in rows] == [True, False]
    assert rows[0].broken[0].startswith("does not compile: ") and rows[0].config == {"BLOCK": 3}


def test_one_compiled_kernel_is_described_once(monkeypatch):
    calls = []
    genuine = offline._tool
    monkeypatch.setattr(offline, "_tool", lambda *arguments: calls.append(arguments) or genuine(*arguments))
    offline._inspect_cubin.cache_clear()
    with offline.compile_offline(["sm_80"]) as kernels:
        for _ in range(3):
            _conv()
    assert len(kernels) == 3 and len(calls) == 2
    rows = table.merge(table.describe(kernel, "bf16", f"net {i % 2}") for i, kernel in enumerate(kernels))
    assert [row.used_by for row in rows] == [("net 0", "net 1")]


def _inner_block(name, config):
    """What an inner bottleneck of ResNet-50's third stage launches, one of each kind, and the stem's pool."""
    if name.startswith("_pool"):
        return True
    shape = (config.get("C"), config.get("K"), config.get("R"))
    kinds = {
        "_conv_fwd_kernel": shape in ((1024, 256, 1), (256, 256, 3)) and config.get("EPILOGUE") == 1,
        "_conv_dgrad_kernel": shape == (1024, 256, 1) and config.get("ADD"),
        "_conv_wgrad_kernel": shape == (256, 256, 3),
    }
    strided = config.get("STRIDE_H", 1) > 1 or config.get("SHORTCUT") == 2 or config.get("PROJECTION")
    return bool(kinds.get(name)) and not strided


@pytest.mark.parametrize("target", TARGETS)
def test_an_inner_block_of_resnet_50_keeps_every_bound(target):
    rows = catalogue.compile_network("resnet50", target, "bf16", _inner_block)
    assert {row.kernel for row in rows} >= {"_conv_fwd_kernel", "_conv_dgrad_kernel", "_conv_wgrad_kernel"}
    for row in rows:
        assert not row.broken, row
        assert (row.spills, row.local_bytes, row.stack_bytes) == (0, 0, 0), row
        assert row.shared_bytes <= row.shared_limit and row.blocks >= 1, row
    for row in (row for row in rows if row.kernel.startswith("_conv")):
        assert row.tensor_core == {"sm_80": "mma", "sm_90": "wgmma"}[target], row
        assert row.wide_copies and row.wide_stores, row
    _is_weighed(next(row for row in rows if row.kernel == "_conv_wgrad_kernel"))


def _is_weighed(row):
    """A 3x3 wgrad of ResNet-50's third stage: g, y and x are read, and every part is written in float32."""
    pixels, filters = catalogue.BATCH * 14 * 14, 256 * 256 * 9
    assert row.flops == 2 * pixels * filters
    read = 3 * pixels * 256 * 2
    assert row.moved > read and (row.moved - read) // (4 * filters) >= 1
    assert row.intensity == row.flops / row.moved > 100


def test_a_kernel_without_a_product_has_no_intensity():
    row = table.describe(_compiled(_conv)[0], "bf16", "planted")
    assert (row.moved, row.flops, row.intensity) == (0, 0, None)


def test_a_row_is_weighed_by_its_largest_launch():
    row = table.describe(_compiled(_conv)[0], "bf16", "planted")
    small, large, other = (
        LaunchRecord(name, row.config, {"activations": (size, size)}, 10 * size)
        for name, size in ((row.kernel, 2), (row.kernel, 8), ("_another_kernel", 64))
    )
    (weighed,) = table.weighed([row], [small, large, other])
    assert (weighed.moved, weighed.flops, weighed.intensity) == (16, 80, 5)


def _compiled(step):
    with offline.compile_offline(["sm_80"]) as kernels:
        step()
    return kernels


def _one_of_each_kind():
    """Lets one launch through of each kernel, set of flags, filter and tile, whatever the channels."""
    seen = set()

    def wanted(name, config):
        sizes = ("C", "K", "PIXEL", "TAP_C")
        kind = (name, *sorted((k, str(v)) for k, v in config.items() if k not in sizes))
        new = kind not in seen
        seen.add(kind)
        return new

    return wanted


@pytest.mark.full
@pytest.mark.parametrize("dtype", catalogue.DTYPES)
@pytest.mark.parametrize("target", catalogue.TARGETS)
def test_every_kind_of_launch_keeps_every_bound(target, dtype):
    wanted = _one_of_each_kind()
    rows = table.merge(
        row for name in catalogue.NETWORKS for row in catalogue.compile_network(name, target, dtype, wanted)
    )
    assert rows and not [(row.kernel, row.tile(), row.geometry(), row.broken) for row in rows if row.broken]


@pytest.fixture
def two_parts(monkeypatch):
    """The command compiles two demonstration kernels instead of networks; the hog is float32's."""

    def part(work):
        network, target, dtype = work
        step = _hog if dtype == "fp32" else _conv
        return work, catalogue.compile_step(step, target, dtype, f"{network} train")

    monkeypatch.setattr(catalogue, "compile_part", lambda work: part(work)[1])


def test_the_command_prints_broken_rows_first_and_fails(two_parts, tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["kernels", "--model", "resnet50", "--targets", "sm_80,sm_86", "--json", str(file)]
    assert main([*arguments, "--dtypes", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "2 kernels compiled, 0 break a bound" in out and "mma" in out and "FLOP/B" in out
    assert main([*arguments, "--dtypes", "bf16,fp32"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("register_hog_kernel") and "spills (" in lines[1]
    assert lines[-1] == "4 kernels compiled, 2 break a bound"
    rows = json.loads(file.read_text())
    assert [bool(row["broken"]) for row in rows] == [True, True, False, False]
    assert {row["target"] for row in rows} == {"sm_80", "sm_86"}


def test_the_command_prints_every_configuration_when_asked(two_parts, capsys):
    assert main(["kernels", "--model", "resnet18", "--targets", "sm_80", "--dtypes", "bf16", "--all"]) == 0
    assert "64x64x32 w4 s3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--jobs", "0"], "--jobs: expected at least 1"),
        (["--targets", "sm_80", "--dtypes", "bf16", "--json", "/nowhere/rows.json"], "--json /nowhere/rows.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(two_parts, arguments, words, capsys):
    assert main(["kernels", "--model", "resnet18", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error and error.startswith("resnet-fused: error: ")


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resnet_fused.compiling.offline", None)
    assert main(["kernels"]) == 2
    assert "kernels: Triton cannot be imported" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--targets", "h100"], ["--dtypes", "fp64"], ["--model", "vgg"]])
def test_unknown_names_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["kernels", *arguments])
    assert stop.value.code == 2 and arguments[1] in capsys.readouterr().err
