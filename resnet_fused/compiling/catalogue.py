"""What is compiled: the launches of real networks, and the tiles that `tune` may try.

A network is fused and run on the meta device, at the size and batch it is trained with, so every launch
has the compile key and the tile it has on a GPU of that target; nothing is allocated and nothing runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import plan
from ..counting import meta_images, on_meta
from ..fuse import fuse
from ..kernels import target as targets
from ..kernels.launch import recording
from ..resnet import BUILDERS
from .candidates import launch_candidates
from .offline import TARGETS, Failure, compile_offline
from .table import Row, describe, failed, merge, weighed

__all__ = ["DTYPES", "NETWORKS", "TARGETS", "compile_network", "compile_step"]

BATCH = 256
# Pixels of the image each network is made for.
NETWORKS = {"resnet50": 224, "resnet18": 224, "cifar-20": 32}
# The dtype, and whether float32 convolutions may use TF32.
DTYPES: dict[str, tuple[torch.dtype, bool]] = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}


@contextlib.contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Set torch's TF32 switch of convolutions for the block."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compile_step(
    step: Callable[[], Any],
    target: str,
    dtype: str,
    used_by: str,
    wanted: Callable[[str, dict[str, Any]], bool] = lambda name, config: True,
) -> list[Row]:
    """Compile every launch of ``step()`` for ``target``, with the tiles chosen for it.

    Args:
        step: host code that launches kernels on meta tensors.  wanted: see `compile_offline`.
        dtype, used_by: what the rows say of themselves.

    Returns:
        One row per compiled kernel, and one per launch that does not compile.
    """
    failures: list[Failure] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(targets.pretend(target))
        kernels = stack.enter_context(compile_offline([target], wanted, failures))
        launches = stack.enter_context(recording(compiling=True))
        step()
    unique = {kernel.key: kernel for kernel in kernels}
    rows = [describe(kernel, dtype, used_by) for kernel in unique.values()]
    return merge(weighed([*rows, *(failed(failure, dtype, used_by) for failure in failures)], launches))


def compile_network(
    network: str,
    target: str,
    dtype: str,
    wanted: Callable[[str, dict[str, Any]], bool] = lambda name, config: True,
) -> list[Row]:
    """Compile what one training step and one inference of ``network`` launch.

    Args:
        network: one of `NETWORKS`.  target: one of `TARGETS`.  dtype: one of `DTYPES`.  wanted: see `compile_offline`.
    """
    of, tf32 = DTYPES[dtype]
    model = fuse(on_meta(lambda: BUILDERS[network](fused=False), of), engine="triton")
    images = meta_images(BATCH, NETWORKS[network], of)

    def train() -> None:
        out = model.train()(images)
        out.backward(torch.empty_like(out))

    def infer() -> None:
        with torch.no_grad():
            model.eval()(images)

    # The rules leave exact float32 to the library; what `tune` may choose instead has to compile all the same.
    with allow_tf32(tf32), plan.force(plan.OWN if dtype == "fp32" else None):
        trained = compile_step(train, target, dtype, f"{network} train", wanted)
        return merge([*trained, *compile_step(infer, target, dtype, f"{network} eval", wanted)])


def compile_candidates(target: str, dtype: str) -> list[Row]:
    """Compile every tile that `tune` may try, on the convolutions of `candidates`."""
    of, tf32 = DTYPES[dtype]
    with allow_tf32(tf32):
        return compile_step(lambda: launch_candidates(of, target), target, dtype, "candidates")


def compile_part(part: tuple[str | None, str, str]) -> list[Row]:
    """`compile_network` of ``(network, target, dtype)``, or `compile_candidates` where the network is None."""
    network, target, dtype = part
    return compile_candidates(target, dtype) if network is None else compile_network(network, target, dtype)
