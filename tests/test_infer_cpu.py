"""Eval mode on the CPU without folding: one op per site, one pass after its convolution, nothing kept, never stale."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import eager, freeze_stages, fuse, unfuse
from resnet_fused.engines import cpu, cpu_plan, cpu_site, library

from .harness import randomise
from .test_cpu_site import LARGE, SMALL, Case, image, parameters, site_call
from .test_equivalence import BLOCKS
from .test_fold import CHANGES, X, hold_inference_to_law, net

REASON = cpu.load() or (None if cpu_site.infers() else "the CPU library is older than its inference op: build it again")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Ops(TorchDispatchMode):
    """Counts this package's ops and torch's batch norms and ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, dtype: torch.dtype) -> None:
    make, channels = BLOCKS[name]
    torch.manual_seed(0)
    block = randomise(make()).eval().to(dtype)
    hold_inference_to_law(block, fuse(copy.deepcopy(block)), torch.randn(3, channels, 13, 11).to(dtype), dtype)


@pytest.mark.parametrize("memory", ["speed", "lean", "min"])
def test_one_op_per_site(memory: str) -> None:
    model = fuse(net(), memory=memory)
    with torch.no_grad(), Ops() as ops:
        model(X)
    # the stem ends in its pool; a stage of one block runs its shortcut by the projection op or as a site
    assert ops.count["site_infer"] + ops.count["projection_fwd"] == 3 * 3 + 2
    assert not any(ops.count[name] for name in ("bn_apply", "native_batch_norm", "relu", "relu_", "add_"))


@pytest.mark.parametrize("shape", [(1, 3, 9, 7), (4, 3, 1, 1)], ids=["batch-1", "one-pixel"])
def test_network(shape: tuple[int, ...]) -> None:
    stock = net()
    hold_inference_to_law(stock, fuse(copy.deepcopy(stock)), torch.randn(shape), torch.float32)
    with torch.inference_mode():
        assert fuse(stock)(X[:0]).shape == (0, 5)


def test_autocast() -> None:
    stock = net()
    with torch.autocast("cpu", torch.bfloat16):
        hold_inference_to_law(stock, fuse(copy.deepcopy(stock)), X, torch.bfloat16)


def _one_filter(model: nn.Module) -> None:
    model.layer1[0].conv3.weight.data[1] = 9.0


@pytest.mark.parametrize("change", [*CHANGES, "one filter through data"])
def test_never_stale(change: str) -> None:
    model = fuse(net())
    with torch.no_grad():
        before = model(X)
    CHANGES.get(change, _one_filter)(model)
    hold_inference_to_law(unfuse(copy.deepcopy(model)), model, X, torch.float32)
    with torch.no_grad():
        assert not torch.equal(model(X), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_non_finite_values_are_those_of_stock(value: float) -> None:
    stock = net()
    model = fuse(copy.deepcopy(stock))
    x = X.clone()
    x[1, 2, 3, 4] = value
    with torch.no_grad():
        want, got = stock(x), model(x)
    assert want.isnan().any() and torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


def test_whatever_wants_no_gradient_is_inferred() -> None:
    model = freeze_stages(fuse(net()), 1).train()
    with Ops() as ops:
        model(X).sum().backward()
    inferred, trained = (ops.count[name] for name in ("site_infer", "site_fwd"))
    assert inferred + trained + ops.count["projection_fwd"] == 1 + 3 * 3 + 2
    assert inferred >= 2 * 3 and trained <= 1 + 3 + 1  # the frozen stage; the stem, which ends in its pool, and layer2
    assert model.layer2[0].conv1.weight.grad is not None
    model.eval()
    with Ops() as ops:
        assert model(X).requires_grad
    assert ops.count["site_fwd"]


def test_a_wanted_gradient_of_the_input_is_given() -> None:
    model = fuse(net().requires_grad_(False))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    twin = X.clone().requires_grad_()
    unfuse(copy.deepcopy(model)).double()(twin.double()).sum().backward()
    assert x.grad is not None and twin.grad is not None and x.grad.shape == twin.grad.shape


def test_compiling() -> None:
    stock = randomise(eager.BasicBlock(8, 8)).eval()
    ours = fuse(copy.deepcopy(stock))
    ours.compile(backend="aot_eager", fullgraph=True)
    hold_inference_to_law(stock, ours, torch.randn(2, 8, 9, 7), torch.float32)


def arguments(case: Case, residual: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    call, params = site_call(case), parameters(case, dtype)
    x = image(case, 0, dtype)
    added: Tensor | None = None
    if residual:
        added = torch.randn_like(library.site_conv(cpu, call, x, params.weight))
    geometry = (*call.stride, *call.padding, *call.dilation, call.groups)
    return (x, added, *params[:6], *geometry, call.eps, True, cpu_plan.OWN_ALL)


@pytest.mark.parametrize("packed", [cpu_plan.OWN_NONE, cpu_plan.OWN_ALL], ids=["library", "packed"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("case", [*SMALL, *LARGE])
def test_the_op_is_its_specification(case: str, residual: bool, packed: int) -> None:
    shape = {**SMALL, **LARGE}[case]
    *given, _ = arguments(shape, residual)
    call = site_call(shape)
    got = torch.ops.resnet_fused.site_infer(*given, packed)
    params = parameters(shape, torch.float32)
    rebuilt = (None, None, None, 1, 0, False, params.weight, *given[8:15], packed)
    y = torch.ops.resnet_fused.site_rebuild(given[0], *rebuilt)
    want = cpu.bn_apply(y, library.eval_moments(cpu, call, params, y.dtype), given[1], None, 1, 0, True)
    assert torch.equal(got, want) and got.stride() == want.stride()


@pytest.mark.parametrize("case", ["3x3", "1x1 stride 2"])
def test_opcheck(case: str) -> None:
    torch.library.opcheck(torch.ops.resnet_fused.site_infer.default, arguments(SMALL[case], True))


def test_an_op_names_what_is_wrong() -> None:
    given = list(arguments(SMALL["3x3"], True))
    given[1] = given[1].double()
    with pytest.raises(RuntimeError, match=r"resnet_fused\.site_infer: residual: expected"):
        torch.ops.resnet_fused.site_infer(*given)
    given[1], given[2] = None, given[2][:, :2]
    with pytest.raises(RuntimeError, match=r"site_infer: weight: expected C / groups input channels, got 2"):
        torch.ops.resnet_fused.site_infer(*given)


def test_what_torch_refuses_is_refused_in_its_words() -> None:
    block = fuse(randomise(eager.ConvBNReLU(4, 4, 5, padding=0)).eval())
    with torch.no_grad(), pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        block(torch.ones(1, 4, 3, 3))


def test_a_library_without_the_op_runs_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpu, "site_infer")
    stock = net()
    ours = fuse(copy.deepcopy(stock))
    with Ops() as ops:
        hold_inference_to_law(stock, ours, X, torch.float32)
    assert ops.count["site_fwd"] and not ops.count["site_infer"]
