"""What a training loop does around a step: determinism, accumulation, averaging, saved-tensor hooks, anomaly mode."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from resnet_fused import fuse
from resnet_fused.modules import FusedBlock
from tests.stack_cases import gradients, identical, images, pair, same, stage, state


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
def test_deterministic_algorithms_repeat_to_the_bit(memory: str) -> None:
    model = fuse(stage(), memory=memory)
    found = []
    with deterministic():
        for net in (copy.deepcopy(model), model):
            net(images(dtype=torch.float32)).square().sum().backward()
            found.append({**gradients(net), **state(net)})
    identical(found[1], found[0])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_accumulate(set_to_none: bool) -> None:
    found = []
    for model in pair().values():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=set_to_none)
            for seed in (1, 2):
                model(images(seed)).square().mean().backward()
            optimizer.step()
        found.append({**gradients(model), **{f"{k}.value": v for k, v in state(model).items()}})
    same(found[1], found[0])


@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
def test_backward_twice_is_what_stock_does(memory: str) -> None:
    stock = stage().double()
    found = []
    for model in (stock, fuse(copy.deepcopy(stock), memory=memory)):
        loss = model(images()).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(gradients(model))
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            loss.backward()
    same(found[1], found[0])


CHANGED: dict[str, Callable[[nn.Sequential, Tensor, Tensor], object]] = {
    "weight": lambda model, x, out: model[0].conv1.weight.mul_(2),
    "gamma": lambda model, x, out: model[0].bn1.weight.mul_(2),
    "input": lambda model, x, out: x.mul_(2),
    "output": lambda model, x, out: out.mul_(2),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_tensor_changed_before_the_backward_is_torchs_error(what: str) -> None:
    for model in pair().values():
        x = images().contiguous(memory_format=torch.channels_last).requires_grad_() * 1  # another layout is copied
        out = model(x)
        with torch.no_grad():
            CHANGED[what](model, x, out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("use_buffers", [True, False])
def test_weight_averaging(use_buffers: bool) -> None:
    found = []
    for model in pair().values():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(2):
            optimizer.zero_grad()
            model(images(seed)).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        update_bn([images(seed) for seed in range(3)], average)
        found.append({**state(average), "out": average.eval()(images(9))})
    assert isinstance(average.module[0], FusedBlock)
    same(found[1], found[0])


def narrow(t: Tensor) -> Tensor:
    return t.to(torch.float32) if t.is_floating_point() else t


HOOKS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "save_on_cpu": save_on_cpu,
    "pack and unpack": lambda: saved_tensors_hooks(lambda t: (t.clone(),), lambda packed: packed[0]),
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
@pytest.mark.parametrize("name", HOOKS)
def test_saved_tensors_may_go_elsewhere(name: str, memory: str) -> None:
    found = []
    for hooks in (contextlib.nullcontext, HOOKS[name]):
        model = fuse(stage().double(), memory=memory)
        with hooks():
            model(images()).square().sum().backward()
        found.append(gradients(model))
    identical(found[1], found[0])


def test_every_large_saved_tensor_goes_through_the_hooks() -> None:
    """So an offload takes all that is kept."""
    model, seen = fuse(stage()), []
    with saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):  # type: ignore[func-returns-value]
        model(images(dtype=torch.float32))
    assert {(2, 8, 6, 6), (2, 4, 6, 6), (2, 16, 6, 6)} <= set(seen)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:Error detected in")
def test_anomaly_detection_names_the_node() -> None:
    model = fuse(stage().double())
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"Function '\w+' returned nan values"):
        (model(images()) * torch.tensor(float("nan"))).sum().backward()


def test_parts_that_are_frozen_get_no_gradient() -> None:
    found = []
    for model in pair().values():
        model[0].conv1.requires_grad_(False)
        model[0].bn2.requires_grad_(False)
        model[1].downsample.requires_grad_(False)
        model(images()).square().sum().backward()
        found.append(gradients(model))
    assert "0.conv1.weight" not in found[1] and "1.downsample.1.bias" not in found[1]
    same(found[1], found[0])


@pytest.mark.parametrize("frozen", [0, 1])
def test_whole_blocks_that_are_frozen(frozen: int) -> None:
    found = []
    for model in pair().values():
        model[frozen].requires_grad_(False).eval()
        model(images()).square().sum().backward()
        found.append({**gradients(model), **{f"{k}.value": v for k, v in state(model).items()}})
    same(found[1], found[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_without_gradients(training: bool, mode: type[torch.no_grad]) -> None:
    found = []
    for model in pair().values():
        with mode():
            out = model.train(training)(images())
        model(images(1)).sum().backward()  # and back to training
        found.append({"out": out, **gradients(model), **{f"{k}.value": v for k, v in state(model).items()}})
    same(found[1], found[0])


def test_a_model_moves_between_dtypes_and_devices() -> None:
    model = pair(torch.float32)["fused"]
    before = state(model)
    assert model.half()(images(dtype=torch.float16)).dtype == torch.float16
    assert model.double()(images()).dtype == torch.float64
    model.load_state_dict(before)
    model.to("meta").to_empty(device="cpu").float().load_state_dict(before)
    assert isinstance(model[0], FusedBlock)
    stock: nn.Module = stage()
    stock.load_state_dict(before)
    x = images(dtype=torch.float32)
    same(model.eval()(x), stock.eval()(x))
