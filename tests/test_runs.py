"""Runs of convolution, batch norm, ReLU and pool loose in a network's forward: what is fused, and what never is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_fused import explain, fuse, unfuse
from resnet_fused.nets import FusedNet
from resnet_fused.nodes import PoolFunction, SiteFunction
from resnet_fused.spec import PoolSpec

from .harness import hold_to_law, randomise, step
from .models import source_b
from .test_recognise import Block

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    """A stem and a head; the tests supply what the stem does."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.block = Block(8, 8)
        self.fc = nn.Linear(8, 4)
        self.flag = True
        for name, part in parts.items():
            self.add_module(name, part)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


def make(stem: Any, **parts: nn.Module) -> Net:
    net = type("UserNet", (Net,), {"stem": stem})(**parts)
    randomise(net)
    return net


def _statement_relu(n: Net, x: Tensor) -> Tensor:
    x = n.bn1(n.conv1(x))
    n.relu(x)
    return x


def _deep(n: Any, x: Tensor) -> Tensor:
    return n.maxpool(n.relu(n.bn1(n.conv1(x))))


STEMS: dict[str, tuple[Any, dict[str, nn.Module], int, bool]] = {
    "functions": (lambda n, x: F.relu(n.bn1(n.conv1(x))), {}, 1, False),
    "no relu": (lambda n, x: n.bn1(n.conv1(x)), {}, 1, False),
    "pool": (lambda n, x: n.maxpool(n.relu(n.bn1(n.conv1(x)))), {}, 1, True),
    "pool function": (lambda n, x: F.max_pool2d(torch.relu(n.bn1(n.conv1(x))), 2), {}, 1, True),
    "pool without relu": (lambda n, x: n.maxpool(n.bn1(n.conv1(x))), {}, 1, True),
    "methods": (lambda n, x: n.bn1(n.conv1(x)).relu_(), {}, 1, False),
    "statement": (_statement_relu, {}, 1, False),
    "identity between": (lambda n, x: n.relu(n.drop(n.bn1(n.conv1(x)))), {"drop": nn.Identity()}, 1, False),
    "normalised input": (lambda n, x: n.relu(n.bn1(n.conv1((x - n.bn1.bias[:3, None, None]) * 2))), {}, 1, False),
    "deep": (
        _deep,
        {
            "conv1": nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)
            )
        },
        2,
        True,
    ),
    "other pool": (lambda n, x: n.maxpool(n.relu(n.bn1(n.conv1(x)))), {"maxpool": nn.AvgPool2d(2)}, 1, False),
    "pool rounds up": (
        lambda n, x: n.maxpool(n.relu(n.bn1(n.conv1(x)))),
        {"maxpool": nn.MaxPool2d(2, ceil_mode=True)},
        1,
        False,
    ),
}


def nodes(out: Tensor) -> list[str]:
    """The names of the autograd nodes behind a result."""
    seen, names, todo = set(), [], [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(type(node).__name__)
            todo += [n for n, _ in node.next_functions]
    return names


def sites_in(model: nn.Module, x: Tensor = X) -> int:
    """How many nodes of the chain but for the block's two are behind a result."""
    return nodes(model(x)).count(f"{SiteFunction.__name__}Backward")


def same_step(got: nn.Module, ref: nn.Module) -> dict[str, Tensor]:
    """Both do the same in a training step, up to rounding; returns what the first did. Copies are stepped."""
    results = [step(copy.deepcopy(model), X) for model in (got, ref)]
    assert results[0].keys() == results[1].keys()
    for key in results[1]:
        torch.testing.assert_close(results[0][key], results[1][key], msg=lambda m, key=key: f"{key}: {m}")
    return results[0]


@pytest.mark.parametrize("name", STEMS)
def test_a_stem_is_fused_inside_the_forward(name: str) -> None:
    stem, parts, sites, pooled = STEMS[name]
    net = make(stem, **parts)
    within = sites_in(fuse(copy.deepcopy(net.block)), torch.randn(2, 8, 4, 4))
    fused = hold_to_law(net, X, torch.float32)
    assert isinstance(fused, FusedNet) and type(fused).__name__ == "UserNet"
    assert [len(run.spec.sites) for run in fused.__dict__["_resnet_fused"].runs] == [sites]
    assert sites_in(fused) == sites + within
    assert (f"{PoolFunction.__name__}Backward" in nodes(fused(X))) == pooled
    assert all("forward" not in m.__dict__ for m in fused.modules())


@pytest.mark.parametrize("layout", ["nchw", pytest.param("channels_last", marks=pytest.mark.full)])
@pytest.mark.parametrize("engine", ["reference", pytest.param(None, marks=pytest.mark.full)])
def test_layouts_and_engines(layout: str, engine: str | None) -> None:
    hold_to_law(make(STEMS["pool"][0]), X, torch.float32, layout=layout, engine=engine)
    hold_to_law(make(STEMS["deep"][0], **STEMS["deep"][1]), X, torch.float32, layout=layout, engine=engine)
    out = fuse(make(lambda n, x: n.relu(n.bn1(n.conv1(x))), block=nn.Identity()))
    assert out.stem(X).stride() == unfuse(out).stem(X).stride()


def test_autocast() -> None:
    hold_to_law(make(STEMS["pool"][0]), X, torch.bfloat16, autocast=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_without_batch_statistics(frozen: bool) -> None:
    net = make(STEMS["pool"][0]).eval()
    if frozen:
        net.train().bn1.eval()
    hold_to_law(net, X, torch.float64)
    fused = fuse(copy.deepcopy(net)).eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(X), net.eval()(X))
    net.train()
    net.bn1 = nn.BatchNorm2d(8, momentum=None)
    hold_to_law(net, X, torch.float64)
    net.bn1 = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    hold_to_law(net, X, torch.float64)


def test_unfuse_copies_and_keys() -> None:
    net = make(STEMS["functions"][0])
    before = [(type(m), sorted(m.__dict__)) for m in net.modules()]
    keys = list(net.state_dict())
    fused = fuse(net)
    twin = copy.deepcopy(fused)
    assert isinstance(twin, FusedNet) and list(twin.state_dict()) == keys
    same_step(twin, fused)
    assert [(type(m), sorted(m.__dict__)) for m in unfuse(fused).modules()] == before
    saved = pickle.loads(pickle.dumps(fuse(source_b.ResNet(source_b.ResidualBlock, (1, 1, 1, 1), width=8))))
    assert isinstance(saved, FusedNet) and sites_in(saved) == 8


@pytest.mark.parametrize("path", ["conv1", "bn1", "relu", "maxpool"])
def test_an_inner_hook_fires_and_sees_tensors(path: str) -> None:
    fused = fuse(make(STEMS["pool"][0]))
    seen: list[Any] = []
    fused.get_submodule(path).register_forward_hook(lambda m, args, out: seen.append((*args, out)))
    with pytest.warns(UserWarning, match=f"runs unfused: hook on {path}"):
        fused(X)
    assert len(seen) == 1 and all(isinstance(t, Tensor) for t in seen[0])
    assert not explain(fused).blocks[0].fused and explain(fused).blocks[0].reason == f"hook on {path}"


def _flagged(n: Net, x: Tensor) -> Tensor:
    x = n.bn1(n.conv1(x))
    return n.relu(x) if n.flag else torch.tanh(x) + x[:1] * 2


def test_what_an_attribute_changes_later_is_honoured() -> None:
    net = make(_flagged)
    fused = fuse(copy.deepcopy(net))
    assert sites_in(fused) > sites_in(net)
    for model in (net, fused):
        model.flag = False
    same_step(fused, net)


def _taps(n: Net, x: Tensor) -> Tensor:
    x = n.conv1(x)
    y = n.bn1(x)
    n.flag and setattr(n, "tap", None)
    z = F.relu(y)
    return z if n.flag else z + y + x.mean()


def test_values_read_twice_later_are_the_same_and_statistics_move_once() -> None:
    net = make(_taps)
    fused = fuse(copy.deepcopy(net))
    for model in (net, fused):
        model.flag = False
    assert int(same_step(fused, net)["bn1.num_batches_tracked"]) == 1


class Escapes(Net):
    """Returns the stem's inner values when asked to."""

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x)
        y = self.bn1(x)
        if not self.flag:
            return [y], {"x": x}
        return self.fc(F.relu(y).mean((2, 3)))


def test_nothing_but_tensors_leaves_a_network() -> None:
    net = Escapes()
    fused = fuse(copy.deepcopy(net))
    assert isinstance(fused, FusedNet)
    net.flag = fused.flag = False
    (y,), named = fused(X)
    assert type(y) is type(named["x"]) is Tensor
    torch.testing.assert_close((y, named["x"]), (net(X)[0][0], net(X)[1]["x"]))


def test_a_child_called_from_outside_is_the_stock_one() -> None:
    fused = fuse(make(STEMS["functions"][0]))
    fused(X)
    assert type(fused.conv1) is nn.Conv2d and type(fused.conv1(X)) is Tensor


def test_replaced_children_are_called() -> None:
    fused = fuse(make(STEMS["functions"][0]))
    fused.fc = nn.Identity()
    assert fused(X).shape == (2, 8) and sites_in(fused) == 2
    fused.conv1 = nn.Conv2d(3, 8, 1)
    torch.testing.assert_close(fused(X), unfuse(copy.deepcopy(fused))(X))
    fused.bn1 = nn.GroupNorm(2, 8)
    with pytest.warns(UserWarning, match="bn1 is a GroupNorm"):
        fused(X)


def test_a_checkpointed_stem_runs_as_written() -> None:
    net = make(lambda n, x: n.relu(n.bn1(n.conv1(x))) if n.flag else checkpoint(n.inner, x, use_reentrant=False))
    type(net).inner = lambda n, x: n.relu(n.bn1(n.conv1(x)))
    fused = fuse(copy.deepcopy(net))
    for model in (net, fused):
        model.flag = False
    same_step(fused, net)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_network_counts_its_batch_once(reentrant: bool) -> None:
    net = make(_statement_relu)
    fused = fuse(copy.deepcopy(net))
    expected = same_step(copy.deepcopy(fused), net)
    out = checkpoint(fused, X.clone().requires_grad_(), use_reentrant=reentrant)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out))
    for name, buffer in fused.named_buffers():
        assert torch.equal(buffer, expected[name].to(buffer.dtype)), name


REFUSED: dict[str, tuple[Any, dict[str, nn.Module], str]] = {
    "data": (lambda n, x: n.relu(n.bn1(n.conv1(x if x.sum() > 0 else -x))), {}, "data-dependent control flow"),
    "modes": (lambda n, x: n.relu(n.bn1(n.conv1(x))) if n.training else n.conv1(x), {}, "different things in training"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    stem, parts, words = REFUSED[name]
    net = fuse(make(stem, **parts))
    assert not isinstance(net, FusedNet)
    (record,) = [r for r in explain(net).blocks if not r.fused]
    assert record.kind == "UserNet" and words in record.reason


def test_control_flow_after_the_stem_is_no_obstacle() -> None:
    net = make(lambda n, x: n.then(F.relu(n.bn1(n.conv1(x)))))
    type(net).then = lambda n, x: x if x.mean() > 0 else x * 2
    assert isinstance(hold_to_law(net, X, torch.float32), FusedNet)


def test_a_shared_batch_norm_is_left_alone() -> None:
    net = make(lambda n, x: n.bn1(n.conv2(F.relu(n.bn1(n.conv1(x))))), conv2=nn.Conv2d(8, 8, 1))
    assert not isinstance(fuse(net), FusedNet)


def test_the_pool_s_window_is_compared_at_run_time() -> None:
    fused = fuse(make(STEMS["pool"][0]))
    (run,) = fused.__dict__["_resnet_fused"].runs
    assert run.spec.pool == PoolSpec((3, 3), (2, 2), (1, 1))
    fused.maxpool.padding = 0
    torch.testing.assert_close(fused(X), unfuse(copy.deepcopy(fused))(X))


@pytest.mark.parametrize("name", ["pool", *(pytest.param(n, marks=pytest.mark.full) for n in ("functions", "deep"))])
def test_compiled_in_one_graph(name: str) -> None:
    net = make(*STEMS[name][:1], **STEMS[name][1])
    compiled = torch.compile(fuse(copy.deepcopy(net)), fullgraph=True, backend="aot_eager")
    got, ref = step(compiled, X), step(net, X)
    torch.testing.assert_close(got["output"], ref["output"])
    torch.testing.assert_close(got["input.grad"], ref["input.grad"])
    assert {k.removeprefix("_orig_mod.") for k in got} == set(ref)


def test_export_and_symbolic_trace_see_plain_operators() -> None:
    fused = fuse(make(STEMS["pool"][0])).eval()
    program = torch.export.export(fused, (X,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("resnet_fused" in t for t in targets) and any("conv2d" in t for t in targets)
    called = [str(node.target) for node in torch.fx.symbolic_trace(fused).graph.nodes if node.op == "call_module"]
    assert called[:4] == ["conv1", "bn1", "relu", "maxpool"]


def test_explain_names_the_run_and_its_sites() -> None:
    net = make(STEMS["functions"][0])
    before = {r.name: r.reason for r in explain(net).blocks}
    assert before["conv1"] == "a chain, but fuse has not been called"
    table = explain(fuse(net), X)
    assert {r.name: (r.kind, r.fused) for r in table.blocks} == {"conv1": ("run", True), "block": ("Block", True)}
    assert [site.plan.conv for site in table.sites] == ["conv1", "block.conv1", "block.conv2"]
