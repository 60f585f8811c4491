"""Frozen batch norms and stages: what they cost, that they stay frozen, and every mix with what trains."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_fused import eager, freeze_bn, freeze_stages, fuse, unfreeze_bn, unfreeze_stages
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
