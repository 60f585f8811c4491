"""`check`: a fused model against stock PyTorch, every tensor under the numerics law."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .numerics import Verdict, judge_all

DTYPES: dict[str, tuple[torch.dtype, bool]] = {
    "fp32": (torch.float32, False),
    "fp64": (torch.float64, False),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "amp-bf16": (torch.bfloat16, True),
    "amp-fp16": (torch.float16, True),
}
"""Names of `check`'s ``dtype``: the dtype, and whether it comes by autocast with float32 parameters."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found.

    Args:
        verdicts: one per tensor.  setting: shape, dtype and mode in words.  seconds: how long it took.
        passed_later: the tensors that broke the law on one input and kept it on another.
    """

    verdicts: tuple[Verdict, ...]
    setting: str
    seconds: float
    passed_later: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every tensor is within the law; there must be tensors."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    def ranked(self) -> list[Verdict]:
        """Failures first, then by how much of its bound a tensor uses, most first."""

        def use(verdict: Verdict) -> float:
            return verdict.error / verdict.bound if verdict.bound > 0 else 0.0

        return sorted(self.verdicts, key=lambda verdict: (verdict.passed, -use(verdict)))

    def table(self, rows: int | None = 12) -> str:
        """The worst ``rows`` tensors (None: all; failures are always shown), and a summary."""
        ranked = self.ranked()
        failed = sum(not verdict.passed for verdict in ranked)
        shown = ranked if rows is None else ranked[: max(rows, failed)]
        width = max((len(verdict.name) for verdict in shown), default=4)
        lines = [f"{'':4}  {'tensor':<{width}}  {'error':>9}  {'bound':>9}  {'eager':>9}  {'|ref|':>9}"]
        for v in shown:
            numbers = f"{v.error:9.2e}  {v.bound:9.2e}  {v.eager_error:9.2e}  {v.size:9.2e}"
            lines.append(f"{'PASS' if v.passed else 'FAIL'}  {v.name:<{width}}  {v.note or numbers}")
        if len(shown) < len(ranked):
            lines.append(f"...   and {len(ranked) - len(shown)} more, all PASS")
        if self.passed_later:
            lines.append(
                f"{len(self.passed_later)} of them kept the law only on a further input (a ReLU near zero flipped)"
            )
        lines.append(f"{self.setting}, {self.seconds:.1f} s")
        lines.append(
            f"{'PASS' if self.passed else 'FAIL'}: {len(ranked) - failed} of {len(ranked)} tensors within the law"
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def _round_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round parameters and float buffers to ``dtype``, in place, keeping their own dtype."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))
    return model


def _one_step(
    model: nn.Module, x: Tensor, dout: Tensor, training: bool, autocast: torch.dtype | None
) -> dict[str, Tensor]:
    """Forward and backward, then a forward in eval mode: every tensor by name."""
    model.train(training)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    context = nullcontext() if autocast is None else torch.autocast(x.device.type, autocast)
    with context:
        out = model(x)
    # The gradient of the output is the output's dtype, which autocast decides; its values are rounded already.
    out.backward(dout.to(out.dtype))
    found = {"output": out.detach(), "grad of input": x.grad}
    found.update({f"grad of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad})
    found.update({f"buffer {name}": b.detach().clone() for name, b in model.named_buffers()})
    model.eval()
    with torch.no_grad(), context:
        found["output in eval mode"] = model(x.detach())
    # Counters are judged as numbers: off by one is far outside any bound.
    return {n: t if t.is_floating_point() else t.double() for n, t in found.items() if t is not None}


def _fused_and_stock(model: nn.Module, stock: nn.Module | None, memory: str) -> tuple[nn.Module, nn.Module]:
    from .fuse import fuse, unfuse

    ours = copy.deepcopy(model)
    if stock is None:
        return fuse(ours, memory=memory), unfuse(copy.deepcopy(model))
    theirs = copy.deepcopy(stock)
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    if result.missing_keys or result.unexpected_keys:
        keys = ", ".join([*result.missing_keys, *result.unexpected_keys][:5])
        raise ValueError(f"check: stock: expected the state_dict keys of model; these are on one side only: {keys}")
    return fuse(ours, memory=memory), theirs


def exercise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm of ``model`` parameters and statistics that a mistake would show in; in place.

    At initialisation gamma is 1 and beta 0, so a kernel that forgot either would pass. Here gamma is 0.5 to
    1.5, and beta two to three standard deviations off zero, to either side: every channel has its ReLU
    on and off, but few activations lie within rounding of zero, where another order of summation flips
    the mask and the gradient jumps.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
                spread, distance, noise, variance = torch.rand(4, module.num_features, generator=generator)
                side = torch.where(torch.rand(module.num_features, generator=generator) < 0.5, -1.0, 1.0)
                module.weight.copy_(0.5 + spread)
                module.bias.copy_(side * (0.5 + spread) * (2 + distance))
                module.get_buffer("running_mean").copy_(noise - 0.5)
                module.get_buffer("running_var").copy_(0.5 + variance)
    return model


def _judge_once(
    ours: nn.Module, theirs: nn.Module, shape: Sequence[int], kind: torch.dtype, amp: bool, training: bool, seed: int
) -> list[Verdict]:
    """One input: float64, eager in both memory formats, and ours; the models are copied."""
    own = torch.float32 if amp else kind
    device = next(theirs.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator).to(kind).to(device, own)
    wide = copy.deepcopy(theirs).double()
    with torch.no_grad():
        sample = copy.deepcopy(wide).train(training)(x.double())
    dout = torch.randn(sample.shape, generator=generator).to(kind).to(device, own)
    ref = _one_step(wide, x.double(), dout.double(), training, None)
    last = torch.channels_last
    autocast = kind if amp else None

    def step(model: nn.Module, layout: torch.memory_format) -> dict[str, Tensor]:
        placed = copy.deepcopy(model).to(memory_format=layout)
        return _one_step(placed, x.to(memory_format=layout), dout, training, autocast)

    eager = [step(theirs, layout) for layout in (torch.contiguous_format, last)]
    return judge_all(step(ours, last), ref, eager, kind)


def check(
    model: nn.Module,
    stock: nn.Module | None = None,
    *,
    shape: Sequence[int],
    dtype: str = "fp32",
    seed: int = 0,
    training: bool = True,
    memory: str = "speed",
    inputs: int = 3,
) -> Report:
    """Compare a fused model with stock PyTorch on one training step and one evaluation.

    Output, gradient of the input, gradient of every parameter and every buffer, then the output in eval
    mode, are judged by `resnet_fused.numerics`: against float64 on inputs rounded to the dtype, with the
    errors of eager NCHW and eager channels_last as the measure. The model is copied, never changed.

    A tensor that breaks the law is judged again on another input, up to ``inputs`` in all, and fails when
    it breaks the law on every one. A deep net needs that: where an activation lies within rounding of
    zero, its ReLU may flip and the gradients before it jump, in eager too (eager channels_last with the
    batch in another order breaks the law this way); a flip is an accident of one input, a mistake is not.

    Args:
        model: fused or not (a copy is fused). Its device is used.
        stock: the same model in plain torch.nn; None takes ``unfuse`` of a copy. It gets ``model``'s state.
        shape: of the input, ``(N, C, H, W)``.
        dtype: one of `DTYPES`.
        seed: of the first input and of the gradient of the output.
        training: batch norm with batch statistics; False with running ones (frozen), gradients all the same.
        memory: as in `resnet_fused.fuse`.
        inputs: at least 1.

    Raises:
        ValueError: an unknown dtype, a shape that is not four positive sizes, ``inputs`` below 1, or a
            ``stock`` with other keys.
    """
    if dtype not in DTYPES:
        raise ValueError(f"check: dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"check: shape: expected (N, C, H, W), all positive; got {tuple(shape)}")
    if inputs < 1:
        raise ValueError(f"check: inputs: expected at least 1, got {inputs}")
    start = time.perf_counter()
    kind, amp = DTYPES[dtype]
    ours, theirs = _fused_and_stock(model, stock, memory)
    for side in (ours, theirs):
        _round_parameters(side, kind).to(torch.float32 if amp else kind)
    verdicts: dict[str, Verdict] = {}
    repeated: set[str] = set()
    for attempt in range(inputs):
        found = {v.name: v for v in _judge_once(ours, theirs, shape, kind, amp, training, seed + attempt)}
        suspects = {name for name, verdict in verdicts.items() if not verdict.passed}
        verdicts.update(found if attempt == 0 else {name: found[name] for name in suspects})
        if all(verdict.passed for verdict in verdicts.values()):
            break
        repeated |= {name for name, verdict in verdicts.items() if not verdict.passed}
    size = "x".join(str(n) for n in shape)
    state = "in training" if training else "frozen"
    setting = f"{size} {dtype} on {next(theirs.parameters()).device.type}, memory {memory!r}, batch norm {state}"
    passed_later = tuple(sorted(name for name in repeated if verdicts[name].passed))
    return Report(tuple(verdicts.values()), setting, time.perf_counter() - start, passed_later)
