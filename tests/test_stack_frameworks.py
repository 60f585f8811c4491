"""Lightning and Accelerate do with a fused model what they do with any; fused before or after they take it over."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import fuse
from resnet_fused.modules import FusedBlock, FusedTrunk
from tests.stack_cases import same, state

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3])


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet_fused.cifar_resnet(8, fused=False)


def fit(lightning: Any, model: nn.Module, precision: str, where: Path, after: bool) -> dict[str, Tensor]:
    class Task(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def configure_model(self) -> None:
            if after:
                fuse(self.model)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=2, precision=precision, sync_batchnorm=False, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=where,
    )  # fmt: skip
    trainer.fit(Task(), data)
    return state(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision: str, when: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is the program under test")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        stock = fit(lightning, network(), precision, tmp_path, False)
        model = network() if when == "after" else fuse(network())
        got = fit(lightning, model, precision, tmp_path, when == "after")
    assert isinstance(model.layer1[0], FusedBlock)
    assert int(got["bn1.num_batches_tracked"]) == 2
    if precision == "32-true":
        same(got, stock)
    else:
        assert got.keys() == stock.keys() and all(t.isfinite().all() for t in got.values())


@pytest.fixture
def accelerate() -> Any:
    module = pytest.importorskip("accelerate", reason="Accelerate is the program under test")
    yield module
    module.state.AcceleratorState._reset_state(True)
    module.state.GradientState._reset_state()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mixed", ["no", "bf16"])
def test_accelerate(mixed: str, when: str, accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed)
    found = []
    for fused in (False, True):
        model = network()
        if fused and when == "before":
            fuse(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        if fused and when == "after":
            fuse(prepared)
        out = prepared(X)
        assert out.dtype == torch.float32
        accelerator.backward(nn.functional.cross_entropy(out, Y))
        with resnet_fused.protected_statistics(model, optimizer):
            optimizer.step()
        bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert bare is model and isinstance(bare.layer1[0], FusedBlock) == isinstance(bare, FusedTrunk) == fused
        assert "forward" not in copy.copy(bare.__dict__) or bare(X).shape == (4, 10)
        found.append(state(bare))
    assert int(found[1]["bn1.num_batches_tracked"]) >= 1
    if mixed == "no":
        same(found[1], found[0])
