"""Layer responses on the Triton engine, emulated or on a GPU, and on every architecture of the zoo."""

from __future__ import annotations

import copy

import pytest
import torch

from resnet_fused import fuse, layer_responses, watch_responses

from .engine_harness import basic, bottleneck, fresh_engine, fused, images, needs_compiler, running
from .harness import randomise, step
from .models.zoo import ZOO
from .test_responses import hold

__all__ = ["fresh_engine"]


@needs_compiler
@pytest.mark.parametrize("make", [basic, pytest.param(bottleneck, marks=pytest.mark.full)])
def test_triton_blocks_are_watched_and_measured(make, device: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    stock, x = make(), images()
    model = fused(stock).to(device)
    with running(device=device) as launches:
        with watch_responses(model) as watch:
            step(model, x.to(device))
        model.eval()
        frozen = layer_responses(model, x.to(device))
    assert launches and not watch.latest().unseen
    hold(watch.latest(), copy.deepcopy(stock), [x], "float32")
    stock.load_state_dict(model.cpu().state_dict())  # running statistics have moved
    hold(frozen, stock.eval(), [x], "float32")
    assert {row.how for row in frozen} == {"measured"}


@pytest.mark.full
@pytest.mark.parametrize(("make", "shape"), [pytest.param(*entry[1:], id=entry[0]) for entry in ZOO])
def test_every_architecture(make, shape) -> None:
    """Names, order and values of the fused net are the stock net's, which hooks measure."""
    torch.manual_seed(0)
    stock, x = randomise(make()), torch.randn(shape)
    measured = layer_responses(stock, x)
    found = layer_responses(fuse(copy.deepcopy(stock)), x)
    assert found.names == measured.names and not found.unseen
    torch.testing.assert_close(torch.tensor(found.std), torch.tensor(measured.std))
