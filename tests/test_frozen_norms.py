"""Frozen batch norms of every kind have the stock numbers: mixed in a block, other projects' classes, detectors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import eager, explain, freeze_bn, freeze_stages, fuse, unfreeze_bn
from resnet_fused.modules import FusedBlock
from resnet_fused.numerics import assert_law

from .harness import hold_to_law, randomise
from .test_freeze import X, net


class Mixed:
    """States inside one block."""

    @staticmethod
    def frozen_class(block: nn.Module) -> None:
        block.bn2 = frozen_copy(block.bn2, Detectron2Norm)

    @staticmethod
    def frozen_shortcut(block: nn.Module) -> None:
        block.downsample[1] = frozen_copy(block.downsample[1], Detectron2Norm)

    @staticmethod
    def cumulative_beside_frozen(block: nn.Module) -> None:
        block.bn1.momentum = None
        freeze_bn(block.bn2)

    @staticmethod
    def untracked_beside_frozen(block: nn.Module) -> None:
        block.bn1 = nn.BatchNorm2d(4, track_running_stats=False)
        freeze_bn(block.bn3)

    @staticmethod
    def no_affine_beside_frozen(block: nn.Module) -> None:
        block.bn3 = nn.BatchNorm2d(16, affine=False)
        freeze_bn(block.bn1)

    @staticmethod
    def some_want_gradients(block: nn.Module) -> None:
        for wanted, parameter in enumerate(block.parameters()):
            parameter.requires_grad_(wanted % 3 == 0)

    @staticmethod
    def only_the_last_norm_trains(block: nn.Module) -> None:
        block.requires_grad_(False)
        freeze_bn(block)
        unfreeze_bn(block.bn3)
        block.bn3.weight.requires_grad_(True)

    @staticmethod
    def only_the_shortcut_trains(block: nn.Module) -> None:
        freeze_bn(block.requires_grad_(False))
        unfreeze_bn(block.downsample)
        block.downsample.requires_grad_(True)

    @staticmethod
    def only_the_first_convolution_trains(block: nn.Module) -> None:
        freeze_bn(block.requires_grad_(False))
        block.conv1.requires_grad_(True)


MIXES = [name for name in vars(Mixed) if not name.startswith("_")]


class Detectron2Norm(nn.Module):
    """A frozen batch norm as detectron2 has it: buffers by these names, an ``eps``, a batch norm by function."""

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.num_features, self.eps = channels, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)


class BenchmarkNorm(nn.Module):
    """A frozen batch norm as maskrcnn-benchmark has it: no eps, arithmetic on the buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class HiddenEps(BenchmarkNorm):
    """Of the structure, but with an eps that nobody can read."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)


def frozen_copy(norm: nn.BatchNorm2d, kind: type[nn.Module]) -> nn.Module:
    made = kind(norm.num_features)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(made, name).copy_(getattr(norm, name).detach())
    return made


def projected() -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return randomise(eager.Bottleneck(8, 4, 2, shortcut))


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("memory", ["speed", pytest.param("min", marks=pytest.mark.full)])
def test_mixed_states_in_one_block(memory: str, name: str) -> None:
    hold_to_law(projected(), torch.randn(3, 8, 9, 7), torch.float32, memory=memory, prepare=getattr(Mixed, name))


@pytest.mark.parametrize("kind", [Detectron2Norm, BenchmarkNorm])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_frozen_classes_of_other_projects(kind: type[nn.Module], training: bool) -> None:
    block = projected()
    for name in ("bn1", "bn2", "bn3"):
        setattr(block, name, frozen_copy(getattr(block, name), kind))
    block.downsample[1] = frozen_copy(block.downsample[1], kind)
    assert isinstance(hold_to_law(block.train(training), torch.randn(2, 8, 9, 7), torch.float32), FusedBlock)


def test_a_frozen_class_that_computes_something_else_is_refused() -> None:
    block = projected()
    block.bn2 = frozen_copy(block.bn2, HiddenEps)
    assert "differs by" in explain(fuse(block)).blocks[0].reason


@pytest.mark.parametrize("kind", ["torchvision", "benchmark"])
def test_autocast_gives_the_dtype_of_stock(kind: str) -> None:
    ops = pytest.importorskip("torchvision.ops", reason="FrozenBatchNorm2d is torchvision's")
    norm = ops.FrozenBatchNorm2d if kind == "torchvision" else BenchmarkNorm
    block = eager.Bottleneck(16, 4, norm_layer=norm)
    hold_to_law(block, torch.randn(2, 16, 7, 5), torch.bfloat16, autocast=True)


def test_a_frozen_stem_of_a_known_trunk() -> None:
    ops = pytest.importorskip("torchvision.ops", reason="FrozenBatchNorm2d is torchvision's")
    model = hold_to_law(net(ops.FrozenBatchNorm2d), X, torch.float32)
    assert explain(model).blocks[0].kind == "stem"
    assert explain(fuse(net(BenchmarkNorm))).blocks[0].kind != "stem"  # nothing proves it


def detector(frozen: bool) -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="detection is torchvision's")
    if not frozen:
        return models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=3, min_size=32, max_size=32
        )
    backbone = models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=3
    )
    heads = models.detection.faster_rcnn
    small = {"box_head": heads.TwoMLPHead(256 * 7 * 7, 8), "box_predictor": heads.FastRCNNPredictor(8, 3)}
    return models.detection.FasterRCNN(backbone, **small, min_size=32, max_size=32)


def detection_step(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)  # proposals are sampled
    images = [torch.rand(3, 32, 32, dtype=torch.float64) for _ in range(2)]
    targets = [{"boxes": torch.tensor([[4.0, 4, 20, 25]]).double(), "labels": torch.tensor([1])} for _ in images]
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{k: v.detach() for k, v in losses.items()}, **grads, **dict(model.named_buffers())}


@pytest.mark.parametrize("frozen", [True, pytest.param(False, marks=pytest.mark.full)], ids=["frozen-18", "stock-50"])
def test_detection(frozen: bool) -> None:
    stock = detector(frozen).double()
    ours = copy.deepcopy(stock)
    fuse(ours.backbone)
    records = explain(ours.backbone).blocks
    blocks = 8 if frozen else 1 + 16  # with the stem, which is fused where its batch norm is torch's own
    assert len(records) == blocks and all(record.fused for record in records)
    last = copy.deepcopy(stock).to(memory_format=torch.channels_last)  # a picture of 32 pixels is ill-conditioned
    got, want, other = (detection_step(model) for model in (ours, stock, last))
    wide = [{name: t for name, t in found.items() if t.dtype == torch.float64} for found in (got, want, other)]
    assert_law(wide[0], wide[1], wide[2:], torch.float64)
    assert all(got[name].equal(t) for name, t in want.items() if t.dtype != torch.float64)
    body = freeze_stages(ours.backbone, 2).train().body
    assert {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad} >= {"layer1", "layer2"}
    assert resnet_fused.unfuse(ours) is ours
