"""A kernel that does not compile on the user's device: what runs instead, what is said, and what is not swallowed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import resnet_fused
from resnet_fused import plan
from resnet_fused.engines import triton_primitives
from resnet_fused.kernels import (
    bn_apply,
    bn_bwd,
    bn_finalize,
    bn_stats,
    conv_dgrad,
    conv_fwd,
    conv_wgrad,
    join_bwd,
    pool,
)
from resnet_fused.kernels import launch as door

from .engine_harness import OURS, basic, bottleneck, convolutions, fresh_engine, images, needs_compiler, running
from .harness import hold_to_law

__all__ = ["fresh_engine"]
pytestmark = needs_compiler
MODULES = (bn_apply, bn_bwd, bn_finalize, bn_stats, conv_dgrad, conv_fwd, conv_wgrad, join_bwd, pool)
ERRORS = {
    "out of resources": (OutOfResources(300_000, 232_448, "shared memory"), "OutOfResources: out of resource: shared"),
    "compilation": (CompilationError("x = 1", None, "no such op"), "CompilationError: "),
    "ptxas": (PTXASError("ptxas died\nat line 2"), "PTXASError: "),
}
FLOAT = torch.float32


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Exception], list[str]]:
    """``failing(kernel, error)``: from now on a launch of that kernel raises; returns the list of the attempts."""

    def install(kernel: str, error: Exception) -> list[str]:
        attempts: list[str] = []

        def launch(started: Any, *args: Any) -> None:
            if started.fn.__name__ == kernel:
                attempts.append(kernel)
                raise error
            door.launch(started, *args)

        for module in MODULES:
            monkeypatch.setattr(module, "launch", launch)
        return attempts

    return install


# kernel: what the warning names, and what it says runs instead
SITES = {
    "_conv_fwd_kernel": ("our 3x3 convolution of 8 into 8 channels", "the library's"),
    "_conv_dgrad_kernel": ("our 3x3 convolution of 8 into 8 channels", "the library's"),
    "_conv_wgrad_kernel": ("our 3x3 convolution of 8 into 8 channels", "the library's"),
    "_bn_finalize_kernel": ("the kernel of bn_finalize", "plain PyTorch"),
    "_bn_apply_kernel": ("the kernel of bn_apply", "plain PyTorch"),
    "_join_bwd_reduce_kernel": ("the kernel of join_bwd_reduce", "plain PyTorch"),
}
LIBRARY_SITES = {
    "_bn_stats_kernel": ("the kernel of bn_stats", "plain PyTorch"),
    "_bn_bwd_apply_kernel": ("the kernel of bn_bwd_apply", "plain PyTorch"),
    "_bn_bwd_finalize_kernel": ("the kernel of bn_bwd_finalize", "plain PyTorch"),
    "_bn_bwd_reduce_kernel": ("the kernel of bn_bwd_reduce_rebuild", "plain PyTorch"),
}


def notices(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "resnet_fused" in str(w.message)]


@pytest.mark.parametrize(
    ("kernel", "variant", "error"),
    [
        *(("_conv_fwd_kernel", "own", error) for error in ERRORS),
        *((kernel, "own", "out of resources") for kernel in list(SITES)[1:]),
        *((kernel, "library", "compilation") for kernel in LIBRARY_SITES),
    ],
)
def test_a_kernel_that_does_not_compile_is_replaced_and_named_once(failing, kernel, variant, error):
    raised, reason = ERRORS[error]
    attempts = failing(kernel, raised)
    with running(variant), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hold_to_law(basic(), images(), FLOAT, engine="triton")
    what, instead = {**SITES, **LIBRARY_SITES}[kernel]
    (notice,) = notices(caught)
    assert notice.startswith(f"resnet_fused: {what} does not compile here ({reason}"), notice
    assert notice.endswith(f"; {instead} runs instead") and "\n" not in notice
    assert len(attempts) == 1  # both sites of the block have one shape, and it is not tried again


@pytest.mark.parametrize("kernel", [*SITES, "_bn_stats_kernel"])
def test_running_statistics_move_once_whatever_fails(failing, kernel):
    failing(kernel, ERRORS["out of resources"][0])
    block = resnet_fused.fuse(bottleneck(), engine="triton")
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    stock = resnet_fused.unfuse(copy.deepcopy(block))
    stock(images())
    with running(), pytest.warns(UserWarning, match="does not compile here") if kernel in SITES else nullcontext():
        out = block(images())
        out.sum().backward()
    for name, buffer in block.named_buffers():
        moved, expected = buffer - before[name], stock.get_buffer(name) - before[name]
        torch.testing.assert_close(moved, expected, msg=name)


@pytest.mark.parametrize(
    ("kernel", "error"),
    [
        ("_conv_fwd_kernel", RuntimeError("CUDA error: an illegal memory access")),
        *((kernel, ValueError("wrong")) for kernel in (*SITES, *LIBRARY_SITES)),
    ],
)
def test_a_real_error_is_not_swallowed(failing, kernel, error):
    attempts = failing(kernel, error)
    block = resnet_fused.fuse(basic(), engine="triton")
    with running("own" if kernel in SITES else "library"), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(error), match=re.escape(str(error))):
            out = block(images().requires_grad_())
            out.backward(torch.ones_like(out))
    assert attempts and not plan._refused and not triton_primitives.broken


def test_the_library_takes_over_one_shape_and_leaves_ours_the_others(monkeypatch):
    block = resnet_fused.fuse(basic(), engine="triton")
    with running() as launches:
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="does not compile here"):
            patch.setattr(conv_fwd, "launch", mock.Mock(side_effect=ERRORS["out of resources"][0]))
            block(images())
        (refused,) = plan._refused
        assert (refused.n, refused.filter) == (2, (3, 3))
        block(images())
        assert not convolutions(launches)
        block(images(3))
        assert convolutions(launches) == {"_conv_fwd_kernel"}


def test_a_backward_whose_second_kernel_fails_is_done_again_as_a_whole(failing):
    failing("_conv_wgrad_kernel", ERRORS["out of resources"][0])
    with running() as launches, pytest.warns(UserWarning, match="does not compile here"):
        hold_to_law(bottleneck(), images(), FLOAT, engine="triton")
    assert convolutions(launches) == OURS - {"_conv_wgrad_kernel"}
