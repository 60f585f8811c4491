"""Training step of whole nets on the CPU, float32.

python -m pytest benchmarks/test_bench_models.py --benchmark-quiet --benchmark-json=benchmarks/results/models.json
"""

from __future__ import annotations

import pytest
import torch

from resnet_fused.resnet import BUILDERS


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_model(name, interleaved, request):
    torch.manual_seed(0)
    batch, image = request.config.getoption("--batch"), request.config.getoption("--image")
    interleaved(name, BUILDERS[name](fused=False), torch.randn(batch, 3, image, image))
