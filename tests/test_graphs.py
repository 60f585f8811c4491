"""Training steps as CUDA graphs: what `graphed` refuses, and that its warm-up moves nothing.

Where there is no GPU, a stand-in for PyTorch's capture runs the model as the real one does to warm up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import graphs
from resnet_fused.numerics import assert_law
from tests.harness import step

SHAPE = (2, 3, 8, 8)


class Dropping(nn.Module):
    """A fused net whose forward draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet_fused.cifar_resnet(20)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.net(x))


def stand_in(module: nn.Module, sample_args: tuple[Tensor, ...]) -> nn.Module:
    """Warm up, three forwards and backwards, then take the forward's place, as the real one does."""
    (sample,) = sample_args
    for _ in range(3):
        out = module(sample)
        torch.autograd.grad(out.sum(), [p for p in module.parameters() if p.requires_grad])
    run, replays = module.forward, []

    def forward(x: Tensor) -> Tensor:
        replays.append(x)
        return run(x)

    module.forward, module.replays = forward, replays
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)


def test_warming_up_moves_nothing(gpu: None) -> None:
    model = Dropping()
    model(torch.randn(SHAPE)).sum().backward()
    state, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    made = resnet_fused.graphed(model, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    assert rng.equal(torch.get_rng_state())
    assert [key for key, value in model.state_dict().items() if not value.equal(state[key])] == []
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [id(p) for p in made.parameters()] == [id(p) for p in model.parameters()]
    assert type(model).forward is Dropping.forward and "forward" not in model.__dict__


def test_state_comes_back_when_the_capture_fails(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: nn.Module, sample_args: tuple[Tensor, ...]) -> nn.Module:
        stand_in(module, sample_args)
        raise RuntimeError("capture failed")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    model = Dropping()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="capture failed"):
        resnet_fused.graphed(model, torch.ones(SHAPE))
    assert rng.equal(torch.get_rng_state())
    assert [key for key, value in model.state_dict().items() if not value.equal(state[key])] == []


def test_training_is_replayed_and_evaluation_is_not(gpu: None) -> None:
    model = resnet_fused.cifar_resnet(20)
    stock, x = copy.deepcopy(model), torch.randn(SHAPE)
    made = resnet_fused.graphed(model, x)
    expected, got = step(stock, x.clone()), step_of(made, x)
    assert [key for key in got if not got[key].equal(expected[key])] == []
    assert len(made._replay.replays) == 1
    made.eval()
    assert made(x[:1]).equal(stock.eval()(x[:1]))
    made.train()
    with torch.no_grad():
        made(x)
    assert len(made._replay.replays) == 1


def step_of(made: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """As `harness.step`, for an input that requires no gradient: parameters' gradients under the model's own names."""
    out = made(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out))
    found = {"output": out.detach()}
    return found | {f"{name}.grad": p.grad for name, p in made.model.named_parameters()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x[:1], r"input: expected \(2, 3, 8, 8\) torch.float32 on cpu.* got \(1, 3, 8, 8\)"),
        (lambda x: x.double(), r"got .*torch.float64"),
        (lambda x: x.contiguous(memory_format=torch.channels_last), r"contiguous.* got .*channels_last"),
        (lambda x: x.requires_grad_(), r"requires_grad=False as the sample had, got .*requires_grad=True"),
    ],
    ids=["shape", "dtype", "layout", "requires_grad"],
)
def test_an_input_unlike_the_sample_is_refused(change: Callable[[Tensor], Tensor], expected: str, gpu: None) -> None:
    made = resnet_fused.graphed(resnet_fused.cifar_resnet(20), torch.randn(SHAPE))
    with pytest.raises(ValueError, match=expected):
        made(change(torch.randn(SHAPE)))
    assert not made._replay.replays


def test_a_part_in_another_mode_is_refused(gpu: None) -> None:
    model = resnet_fused.cifar_resnet(20)
    made = resnet_fused.graphed(model, torch.randn(SHAPE))
    model.bn1.eval()
    with pytest.raises(RuntimeError, match=r"but bn1 changed between train and eval; call graphed again"):
        made(torch.randn(SHAPE))
    model.bn1.train()
    model.conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"graphed: model: expected no hooks, got one on conv1"):
        made(torch.randn(SHAPE))


def hooked_model() -> nn.Module:
    model = resnet_fused.cifar_resnet(20)
    model.bn1.register_full_backward_hook(lambda *_: None)
    return model


REFUSED: dict[str, tuple[Callable[[], object], Callable[[], object], type[Exception], str]] = {
    "no model": (
        lambda: torch.relu,
        lambda: torch.ones(SHAPE),
        ValueError,
        "model: expected an nn.Module, got builtin",
    ),
    "eval": (lambda: Dropping().eval(), lambda: torch.ones(SHAPE), ValueError, "expected training mode, got eval"),
    "no sample": (Dropping, lambda: [1.0], ValueError, "sample: expected a tensor, got list"),
    "flat sample": (Dropping, lambda: torch.ones(2, 3), ValueError, r"\(N, C, H, W\), got \(2, 3\)"),
    "empty sample": (Dropping, lambda: torch.ones(0, 3, 8, 8), ValueError, r"non-empty .* got \(0, 3, 8, 8\)"),
    "integers": (Dropping, lambda: torch.ones(SHAPE, dtype=torch.int64), ValueError, "float tensor .* torch.int64"),
    "another device": (
        lambda: Dropping().to("meta"),
        lambda: torch.ones(SHAPE),
        ValueError,
        "expected every tensor on cpu, got net.conv1.weight on meta",
    ),
    "nothing to train": (
        lambda: Dropping().requires_grad_(False),
        lambda: torch.ones(SHAPE),
        ValueError,
        "a parameter or a sample that requires a gradient, got none",
    ),
    "hook": (hooked_model, lambda: torch.ones(SHAPE), RuntimeError, "expected no hooks, got one on bn1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused(name: str, gpu: None) -> None:
    model, sample, error, expected = REFUSED[name]
    with pytest.raises(error, match=f"graphed: .*{expected}"):
        resnet_fused.graphed(model(), sample())


def test_a_graphed_model_and_a_global_hook_are_refused(gpu: None) -> None:
    made = resnet_fused.graphed(Dropping(), torch.ones(SHAPE))
    with pytest.raises(ValueError, match="got one that is graphed already"):
        resnet_fused.graphed(made, torch.ones(SHAPE))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match="got a global module hook"):
            resnet_fused.graphed(Dropping(), torch.ones(SHAPE))
    finally:
        handle.remove()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="graphed: expected a GPU for CUDA graphs, but torch sees none"):
        resnet_fused.graphed(Dropping(), torch.ones(SHAPE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="sample: expected a tensor on a GPU, got one on cpu"):
        resnet_fused.graphed(Dropping(), torch.ones(SHAPE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs cannot be captured")
def test_a_graph_on_a_gpu_trains_as_the_model_does() -> None:
    model = resnet_fused.cifar_resnet(20).cuda()
    stock, wide, x = copy.deepcopy(model), copy.deepcopy(model).double(), torch.randn(SHAPE, device="cuda")
    made = resnet_fused.graphed(model, x)
    for net, given in ((stock, x), (wide, x.double()), (made, x)):
        for _ in range(2):
            net.zero_grad()
            net(given).sum().backward()
    ours, theirs, ref = (
        {**{n: p.grad for n, p in m.named_parameters()}, **dict(m.named_buffers())} for m in (model, stock, wide)
    )
    ref = {name: t.double() for name, t in ref.items()}
    assert_law(ours, ref, [theirs], torch.float32)
