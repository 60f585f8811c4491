"""Frozen batch norms and stages: what they cost, that they stay frozen, and every mix with what trains."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import eager, explain, freeze_bn, freeze_stages, fuse, unfreeze_bn, unfreeze_stages
from resnet_fused.modules import FusedBlock
from resnet_fused.train.memory import kept_for_backward

from .harness import hold_to_law, randomise, step

X = torch.randn(2, 3, 11, 9, generator=torch.Generator().manual_seed(3))


def net(norm: object = None, block: type = eager.Bottleneck) -> eager.ResNet:
    torch.manual_seed(0)
    made = eager.ResNet(block, [2, 2], 5, planes=[4, 6], stem=eager.StemConfig(8, 3, 1), norm_layer=norm)  # type: ignore[arg-type]
    randomise(made)
    return made


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def state(model: nn.Module) -> list[object]:
    """Everything that freezing may touch, and what it may not."""
    flags: list[object] = [(m.training, type(m), sorted(m.__dict__)) for m in model.modules()]
    return flags + [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()] + [*model.state_dict()]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "statistics"])
def test_frozen_norms_stay_frozen_and_equal_stock(affine: bool) -> None:
    def prepare(model: nn.Module) -> None:
        freeze_bn(model, affine=affine).train()
        assert not any(norm.training for norm in norms(model))
        assert all(p.requires_grad is not affine for norm in norms(model) for p in norm.parameters())

    model = hold_to_law(net(), X, torch.float32, prepare=prepare)
    before = {name: b.clone() for name, b in model.named_buffers()}
    step(model.train(), X)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock"])
def test_undo_is_exact(fused: bool) -> None:
    model = fuse(net()) if fused else net()
    norms(model)[1].eval()
    norms(model)[2].weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    before = state(model)
    unfreeze_bn(freeze_bn(freeze_bn(model), affine=False))
    assert state(model) == before
    unfreeze_stages(freeze_stages(freeze_stages(model, 2), 1))
    assert state(model) == before
    freeze_stages(freeze_bn(model), 1)
    unfreeze_bn(model)
    assert not model.bn1.weight.requires_grad and not model.bn1.train().training
    assert model.layer2[0].bn1.weight.requires_grad and model.layer2[0].bn1.training
    assert state(unfreeze_stages(model)) == before


def test_undo_gives_the_mode_last_asked_for() -> None:
    model = freeze_bn(net().eval())
    model.train()
    assert not any(norm.training for norm in norms(model))
    assert all(norm.training for norm in norms(unfreeze_bn(model)))
    freeze_bn(model).eval()
    assert not any(norm.training for norm in norms(unfreeze_bn(model)))
    with pytest.raises(ValueError, match="expected to be boolean"):
        freeze_bn(model).bn1.train(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_frozen_for_themselves(copied: object) -> None:
    model = freeze_stages(fuse(net()), 1)
    twin = copied(model)  # type: ignore[operator]
    unfreeze_stages(model)
    twin.train()
    assert model.bn1.training and not twin.bn1.training and not twin.conv1.weight.requires_grad
    unfreeze_stages(twin)
    assert twin.bn1.training and twin.conv1.weight.requires_grad
    assert list(twin.state_dict()) == list(net().state_dict())


def test_freezing_needs_statistics() -> None:
    model = net(lambda c: nn.BatchNorm2d(c, track_running_stats=c != 6))
    before = state(model)
    for freeze in (freeze_bn, lambda m: freeze_stages(m, 2)):
        with pytest.raises(ValueError, match=r"expected batch norms with running statistics, got 'layer2\.0\.bn1'"):
            freeze(model)
        assert state(model) == before
    freeze_stages(model, 1)
    with pytest.raises(TypeError, match=r"freeze_bn: model: expected a torch\.nn\.Module, got int"):
        freeze_bn(3)  # type: ignore[type-var]


def frozen_names(model: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_stages_by_name(stages: int) -> None:
    model = freeze_stages(net(), stages).train()
    frozen = {"conv1", "bn1", *["layer1", "layer2"][:stages]}
    assert frozen_names(model) == frozen
    moving = {name.split(".")[0] for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert moving == {"bn1", "layer1", "layer2"} - frozen


class Detectron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.res2, self.res3 = nn.Sequential(nn.Conv2d(4, 4, 1)), nn.Sequential(nn.Conv2d(4, 4, 1))


def test_stages_of_other_projects() -> None:
    assert frozen_names(freeze_stages(Detectron(), 1)) == {"stem", "res2"}
    face = nn.Module()
    face.embedder, face.encoder, face.head = nn.Conv2d(3, 4, 1), nn.Module(), nn.Linear(4, 4)
    face.encoder.stages = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
    freeze_stages(face, 1)
    assert [name for name, p in face.named_parameters() if not p.requires_grad] == [
        "embedder.weight", "embedder.bias", "encoder.stages.0.weight", "encoder.stages.0.bias",
    ]  # fmt: skip
    timm = pytest.importorskip("timm", reason="timm's networks are an optional check")
    deep = timm.create_model("resnet26d", pretrained=False)
    assert frozen_names(freeze_stages(deep, 1)) == {"conv1", "bn1", "layer1"}
    assert not deep.train().conv1[1].training


def test_stages_that_cannot_be_found() -> None:
    for model, got in (
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "none in a Sequential"),
        (nn.ModuleList([net(), net()]), "in 0, 1"),
    ):
        with pytest.raises(ValueError, match=f"expected one residual network.*got {got}"):
            freeze_stages(model, 1)
    for stages in (-1, 3):
        with pytest.raises(ValueError, match=f"stages: expected 0 to 2, the model's stages, got {stages}"):
            freeze_stages(net(), stages)
    with pytest.raises(TypeError, match="stages: expected an integer, got bool"):
        freeze_stages(net(), True)


@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
def test_a_frozen_beginning_keeps_nothing(memory: str) -> None:
    frozen = freeze_stages(fuse(net(), memory=memory), 1).train()
    with torch.no_grad():
        between = frozen.layer1(frozen.maxpool(F.relu(frozen.bn1(frozen.conv1(X)))))
        between = between.contiguous(memory_format=torch.channels_last)
    tail = nn.Sequential(frozen.layer2, frozen.avgpool, nn.Flatten(), frozen.fc)
    # beside what the tail alone keeps: its input, which is not counted where it is the network's
    assert kept_for_backward(frozen, X) == kept_for_backward(tail, between) + between.nbytes
    everything = freeze_stages(fuse(net(), memory=memory), 2).train()
    everything.fc.requires_grad_(False)
    assert kept_for_backward(everything, X) == 0
    assert not everything(X).requires_grad


@pytest.mark.parametrize("stages", [0, 1, 2])
@pytest.mark.parametrize("memory", ["speed", pytest.param("min", marks=pytest.mark.full)])
def test_frozen_stages_equal_stock(memory: str, stages: int) -> None:
    hold_to_law(net(), X, torch.float32, memory=memory, prepare=lambda m: freeze_stages(m, stages).train())


def test_a_frozen_beginning_has_no_backward() -> None:
    model = freeze_stages(fuse(net()), 1).train()
    model(X).sum().backward()
    assert all(
        (p.grad is None) is (name.split(".")[0] in ("conv1", "bn1", "layer1")) for name, p in model.named_parameters()
    )
    nodes, names = [model(X).grad_fn], Counter[str]()
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        names[node.name()] += 1
        new = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= new
        nodes += new
    sites = sum(count for name, count in names.items() if "SiteFunction" in name)
    assert sites == 7 and "PoolFunctionBackward" not in names  # layer2: two blocks of three, and a shortcut


def test_frozen_parameters_are_none_of_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = freeze_stages(freeze_bn(fuse(net())), 1)
        parallel = nn.parallel.DistributedDataParallel(model).train()
        for _ in range(2):  # the second forward raises where a gradient is still waited for
            parallel(X).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert frozen_names(model) >= {"conv1", "bn1", "layer1"} and not any(norm.training for norm in norms(model))
    assert model.layer2[0].conv1.weight.grad is not None and model.conv1.weight.grad is None


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
    assert len(records) == (8 if frozen else 16) and all(record.fused for record in records)
    got, want = detection_step(ours), detection_step(stock)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)
    body = freeze_stages(ours.backbone, 2).train().body
    assert {name.split(".")[0] for name, p in body.named_parameters() if not p.requires_grad} >= {"layer1", "layer2"}
    assert resnet_fused.unfuse(ours) is ours
