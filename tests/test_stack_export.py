"""Export, ONNX, tracing: plain ATen operators, the same as the stock model's, and the same numbers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import fuse
from resnet_fused.modules import FusedBlock
from resnet_fused.numerics import assert_law
from tests.stack_cases import images, pair, same


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("strict", "training"),
    [(False, False), (True, False), *(pytest.param(strict, True, marks=pytest.mark.full) for strict in (False, True))],
)
def test_export_is_the_stock_program(strict: bool, training: bool) -> None:
    stock, fused = pair().values()
    programs = [torch.export.export(m.train(training), (images(),), strict=strict) for m in (stock, fused)]
    assert operators(programs[0]) == operators(programs[1])
    assert not [name for name in operators(programs[1]) if "resnet_fused" in name]
    if not training:
        same(programs[1].module()(images()), stock(images()))


def test_export_of_a_trunk_with_an_open_batch_size() -> None:
    model = fuse(resnet_fused.cifar_resnet(8, fused=False)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert not [name for name in operators(program) if "resnet_fused" in name]
    for given in (x, torch.randn(5, 3, 8, 8, dtype=torch.float64)):
        same(program.module()(given), model(given))


TRACES: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "jit.trace": lambda m: torch.jit.trace(m, images()),
    "symbolic_trace": torch.fx.symbolic_trace,
}


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize("name", TRACES)
def test_traces_hold_the_plain_operators(name: str) -> None:
    stock, fused = (model.eval() for model in pair().values())
    made = TRACES[name](fused)
    text = str(made.inlined_graph if name == "jit.trace" else made.graph)  # type: ignore[attr-defined]
    assert "resnet_fused::" not in text and "Fused" not in text and ("_convolution" in text or "conv1" in text)
    same(made(images(1)), stock(images(1)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_script_compiles_the_stock_modules(training: bool) -> None:
    """And leaves the fused model as it is; the parameters are shared."""
    stock, fused = (model.train(training) for model in pair().values())
    kinds = [type(module) for module in fused.modules()]
    script = torch.jit.script(fused)
    same(script(images()), stock(images()))
    assert [type(module) for module in fused.modules()] == kinds and isinstance(fused[0], FusedBlock)
    same({k: t.detach() for k, t in script.state_dict().items()}, dict(stock.state_dict()))
    same(fused(images()), stock(images()))
    with torch.no_grad():
        fused[0].conv1.weight.zero_()
    assert not script.state_dict()["0.conv1.weight"].any()


@pytest.mark.parametrize("extent", ["stage", pytest.param("trunk", marks=pytest.mark.full)])
def test_onnx(extent: str) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="torch.onnx.export needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime runs the exported model")
    torch.manual_seed(0)
    if extent == "trunk":
        stock, x = resnet_fused.cifar_resnet(8, fused=False).eval(), torch.randn(2, 3, 8, 8)
    else:
        stock, x = pair(torch.float32)["stock"].eval(), images(dtype=torch.float32)
    model = fuse(copy.deepcopy(stock))
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    kinds = {node.op_type for node in program.model.graph}
    assert "Conv" in kinds and all(node.domain in ("", "ai.onnx") for node in program.model.graph)
    buffer = io.BytesIO()
    program.save(buffer)
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    eager = [stock(x).detach(), stock(x.contiguous(memory_format=torch.channels_last)).detach()]
    ref = copy.deepcopy(stock).double()(x.double()).detach()
    assert_law({"out": torch.from_numpy(got)}, {"out": ref}, [{"out": t} for t in eager], torch.float32)
