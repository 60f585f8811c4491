"""`check` passes right models and catches planted mistakes."""

import pytest
import torch
from torch import nn

from resnet_fused import fuse
from resnet_fused.checking import check, exercise
from resnet_fused.resnet import cifar_resnet

SHAPE = (4, 3, 16, 16)


def net():
    torch.manual_seed(0)
    return exercise(cifar_resnet(8, fused=False))


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "amp-bf16"])
@pytest.mark.parametrize("memory", ["speed", "min"])
def test_a_right_model_passes_and_is_not_touched(dtype, memory):
    model = fuse(net())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = check(model, shape=SHAPE, dtype=dtype, memory=memory)
    assert report.passed, str(report)
    names = {verdict.name for verdict in report.verdicts}
    assert {"output", "output in eval mode", "grad of input", "buffer bn1.num_batches_tracked"} <= names
    assert {f"grad of {name}" for name, _ in model.named_parameters()} <= names
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_statistics():
    assert check(net(), shape=SHAPE, training=False).passed


def wrong_eps(model):
    model.layer2[0].bn1.eps = 0.1


def wrong_momentum(model):
    model.layer2[0].bn1.momentum = 0.11


def wrong_counter(model):
    def count_twice(module, args):
        module.num_batches_tracked.add_(1)

    model.bn1.register_forward_pre_hook(count_twice)


def skipped(model):
    model.layer1[0].forward = lambda x: x


@pytest.mark.parametrize(
    ("plant", "caught"),
    [
        (wrong_eps, "output"),
        (wrong_momentum, "buffer layer2.0.bn1.running_var"),
        (wrong_counter, "buffer bn1.num_batches_tracked"),
        (skipped, "output"),
    ],
)
def test_planted_mistakes_are_caught(plant, caught):
    stock, model = net(), net()
    assert check(model, stock, shape=SHAPE).passed
    plant(model)
    report = check(model, stock, shape=SHAPE)
    failed = {verdict.name for verdict in report.verdicts if not verdict.passed}
    assert caught in failed and not report.passed
    assert report.ranked()[0].name in failed
    assert f"FAIL  {caught}" in report.table() and "FAIL: " in str(report)


def test_a_planted_wrong_gradient_is_caught(monkeypatch):
    """The forward is right; one gradient is off by a part in a thousand."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout * 1.001

    stock, model = net(), net()
    model.layer3[0].register_forward_hook(lambda module, args, out: Off.apply(out))
    failed = {verdict.name for verdict in check(model, stock, shape=SHAPE).verdicts if not verdict.passed}
    assert "grad of conv1.weight" in failed and "grad of input" in failed
    assert "output" not in failed and "grad of fc.weight" not in failed


def test_exercise_moves_every_batch_norm_parameter():
    model, plain = net(), cifar_resnet(8, fused=False)
    for ours, theirs in zip(model.modules(), plain.modules()):
        if isinstance(ours, nn.BatchNorm2d):
            assert not torch.isclose(ours.weight, theirs.weight).all() and (ours.bias.abs() > 1).all()


def test_bad_arguments_are_named():
    for keywords, words in [
        ({"dtype": "int8"}, "dtype: expected one of fp32"),
        ({"shape": (3, 16, 16)}, "shape: expected"),
        ({"inputs": 0}, "inputs: expected at least 1"),
        ({"stock": nn.Conv2d(3, 3, 1)}, "stock: expected the state_dict keys"),
    ]:
        with pytest.raises(ValueError, match=words):
            check(net(), **{"shape": SHAPE, **keywords})
