"""Hooks of every kind, on a block and inside it: they fire as in the stock model, with its values."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import fuse
from resnet_fused.modules import Fused, FusedBlock, FusedTrunk
from tests.stack_cases import gradients, images, pair, same, state

Seen = list[tuple[str, list[Tensor]]]


def tensors(*values: object) -> list[Tensor]:
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return [v.detach().clone() for v in flat if isinstance(v, Tensor)]


KINDS: dict[str, Callable[[nn.Module, Seen], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda _, i, o: seen.append(("out", tensors(i, o)))),
    "forward, always called": lambda m, seen: m.register_forward_hook(
        lambda _, i, o: seen.append(("out", tensors(i, o))), always_call=True
    ),
    "forward, changes the output": lambda m, seen: m.register_forward_hook(
        lambda _, i, o: (seen.append(("out", tensors(o))), o * 2)[1]
    ),
    "forward, with keywords": lambda m, seen: m.register_forward_hook(
        lambda _, i, kw, o: seen.append(("out", tensors(i, o))), with_kwargs=True
    ),
    "forward pre": lambda m, seen: m.register_forward_pre_hook(lambda _, i: seen.append(("in", tensors(i)))),
    "full backward": lambda m, seen: m.register_full_backward_hook(
        lambda _, i, o: seen.append(("grads", tensors(i, o)))
    ),
    "full backward pre": lambda m, seen: m.register_full_backward_pre_hook(
        lambda _, o: seen.append(("grads", tensors(o)))
    ),
}
PLACES = ["0", "0.conv2", "0.bn1", "0.bn2", "1.relu", "1.downsample", "1.downsample.1"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_sees_what_it_sees_in_the_stock_model(kind: str, place: str) -> None:
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in pair().values():
            for module in model.modules():
                if isinstance(module, nn.ReLU):
                    module.inplace = False  # torch refuses full backward hooks on what is changed in place
            seen: Seen = []
            handle = KINDS[kind](model.get_submodule(place), seen)
            for seed in (1, 2):
                try:
                    model(images(seed).requires_grad_()).square().sum().backward()
                except RuntimeError as error:
                    seen.append((str(error).splitlines()[0], []))
            after = gradients(model), state(model)
            handle.remove()
            count = len(seen)
            with torch.no_grad():
                model.eval()(images())
            assert len(seen) == count
            found.append((seen, *after))
    assert [name for name, _ in found[1][0]] == [name for name, _ in found[0][0]] and found[0][0]
    for (_, got), (_, ref) in zip(found[1][0], found[0][0], strict=True):
        same(got, ref)
    same(found[1][1], found[0][1])
    same(found[1][2], found[0][2])
    notices = [str(w.message) for w in caught if "runs unfused" in str(w.message)]
    assert len(notices) == (1 if "." in place else 0)


def test_a_removed_hook_leaves_a_fused_block() -> None:
    model = pair()["fused"]
    handle = model[0].conv1.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hook on conv1"):
        assert model[0](images()).grad_fn.name() != "ClosedSiteFunctionBackward"
    handle.remove()
    nodes = model[0](images().contiguous(memory_format=torch.channels_last)).grad_fn.name()
    assert nodes == "ClosedSiteFunctionBackward"


def test_every_reason_is_told_once() -> None:
    model = pair()["fused"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for place in ("conv1", "conv2", "conv1"):
            handle = model[0].get_submodule(place).register_forward_hook(lambda *_: None)
            for _ in range(2):
                model(images())
            handle.remove()
    assert [str(w.message).rpartition(": ")[2] for w in caught] == ["hook on conv1", "hook on conv2"]


def test_global_hooks_see_every_module() -> None:
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for model in pair().values():
            names = {module: name for name, module in model.named_modules()}
            order: list[str] = []
            handle = nn.modules.module.register_module_forward_hook(
                lambda m, i, o, order=order, names=names: order.append(names[m])
            )
            try:
                model(images())
            finally:
                handle.remove()
            found.append(order)
    assert found[1] == found[0] and "0.conv1" in found[0]


def test_an_always_called_hook_fires_after_an_error() -> None:
    calls: list[int] = []
    model = pair()["fused"]
    model[0].register_forward_hook(lambda *_: calls.append(1), always_call=True)
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.ones(2, 3, 6, 6, dtype=torch.float64))
    assert calls == [1]


def test_tensor_hooks_on_parameters() -> None:
    found = []
    for model in pair().values():
        order: list[str] = []
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda g, name=name, order=order: order.append(name))
            parameter.register_post_accumulate_grad_hook(lambda p, name=name, order=order: order.append(f"{name} done"))
        model(images()).square().sum().backward()
        found.append(sorted(order))
    assert found[1] == found[0]


def test_a_summary_of_layers_and_shapes() -> None:
    """As torchsummary and its kind make one: hooks put everywhere by ``model.apply``, class names, output shapes."""
    found = []
    for fused in (False, True):
        model = resnet_fused.cifar_resnet(8, fused=False)
        rows: list[tuple[str, tuple[int, ...], int]] = []

        def add(module: nn.Module, _: Any, out: Tensor, rows: list[Any] = rows) -> None:
            name = str(module.__class__).split(".")[-1].split("'")[0]
            rows.append((name, tuple(out.shape), sum(p.numel() for p in module.parameters(recurse=False))))

        def watch(module: nn.Module, add: Any = add) -> None:
            if not isinstance(module, nn.Sequential):
                module.register_forward_hook(add)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            (fuse(model) if fused else model).apply(watch)
            model(torch.rand(2, 3, 8, 8))
        found.append(rows)
    assert found[1] == found[0] and ("Conv2d", (2, 16, 8, 8), 432) in found[0]


def test_activation_statistics_of_timm() -> None:
    utils = pytest.importorskip("timm.utils.model", reason="timm's hooks are under test")
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in pair().values():
            names = ["0.bn1", "1.relu", "1.downsample.1"]
            hook = utils.ActivationStatsHook(model, names, [utils.avg_sq_ch_mean] * 3)
            model(images())
            found.append(torch.tensor(hook.stats[utils.avg_sq_ch_mean.__name__], dtype=torch.float64))
    assert len(found[1]) == 5  # the ReLU of a bottleneck runs three times
    same(found[1], found[0])


@pytest.fixture(scope="module")
def resnet18() -> dict[str, nn.Module]:
    models = pytest.importorskip("torchvision.models", reason="torchvision is an optional extra")
    torch.manual_seed(0)
    stock = models.resnet18(num_classes=3).double().eval()
    return {"stock": stock, "fused": fuse(copy.deepcopy(stock))}


def test_feature_extraction(resnet18: dict[str, nn.Module]) -> None:
    features = pytest.importorskip("torchvision.models.feature_extraction", reason="torchvision is an optional extra")
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    wanted = ["layer1", "layer2.0.downsample.0", "layer4.1.relu", "fc"]
    made = [features.create_feature_extractor(model, wanted)(x) for model in resnet18.values()]
    same(made[1], made[0])
    assert features.get_graph_node_names(resnet18["fused"]) == features.get_graph_node_names(resnet18["stock"])


def test_intermediate_layers(resnet18: dict[str, nn.Module]) -> None:
    utils = pytest.importorskip("torchvision.models._utils", reason="torchvision is an optional extra")
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64)
    layers = {"layer1": "low", "layer3": "high"}
    getters = [utils.IntermediateLayerGetter(model, layers) for model in resnet18.values()]
    assert isinstance(resnet18["fused"], FusedTrunk) and isinstance(getters[1]["layer1"], Fused)
    assert isinstance(getters[1]["layer1"][0], FusedBlock)
    same(dict(getters[1](x)), dict(getters[0](x)))
