"""A training step asks the device for no value and no shape, so a CUDA graph can capture it (the Triton engine's: see
test_triton_operators)."""

from __future__ import annotations

import copy

import pytest
import torch

import resnet_fused
from resnet_fused import fuse
from tests.stack_cases import NoHostSync, images, stage


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
@pytest.mark.parametrize("engine", [None, "reference"])
def test_no_value_is_read(engine: str | None, memory: str, training: bool) -> None:
    model = fuse(stage(), memory=memory, engine=engine).train(training)
    model[0].bn1.momentum = None  # stock reads its counter on the host
    x = images(dtype=torch.float32).requires_grad_()
    with NoHostSync() as mode:
        model(x).square().sum().backward()
    assert mode.seen
    if training and engine == "reference":
        with pytest.raises(AssertionError, match="looks at a value"), NoHostSync():
            model[0].bn1.num_batches_tracked.item()


def test_a_step_on_the_meta_device() -> None:
    """Where nothing has a value, nothing can be read."""
    with torch.device("meta"):
        model = fuse(resnet_fused.cifar_resnet(8, fused=False))
        x = torch.empty(2, 3, 8, 8)
    out = model(x)
    out.sum().backward()
    assert out.shape == (2, 10) and all(p.grad is not None and p.grad.is_meta for p in model.parameters())


def test_statistics_move_in_place() -> None:
    model = fuse(stage())
    before = {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()}
    old = copy.deepcopy(dict(model.named_buffers()))
    model(images(dtype=torch.float32))
    assert {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()} == before
    assert not [name for name, b in model.named_buffers() if b.equal(old[name])]
