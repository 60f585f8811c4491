"""The numerics law: the one place that says how close is close enough.

The reference is computed in float64 from inputs first rounded to the dtype under test. Our error may
be at most twice the *worse* of eager NCHW's and eager channels_last's error in the same dtype on the
same inputs, plus 4 eps of the dtype times max|ref| (in the RMS form: times the RMS of ref). It holds
for the output, every gradient and every buffer. A plain factor of two with one eager layout would
reject eager channels_last against eager NCHW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

EAGER_FACTOR = 2.0
EPS_FACTOR = 4.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One tensor under the law: the worst form's error and bound, and eager's own error, all absolute."""

    name: str
    passed: bool
    error: float
    bound: float
    eager_error: float
    size: float
    note: str = ""

    def __str__(self) -> str:
        state = "PASS" if self.passed else "FAIL"
        detail = self.note or f"error {self.error:.3e}, bound {self.bound:.3e}, eager {self.eager_error:.3e}"
        return f"{state} {self.name}: {detail} (|ref| {self.size:.3e})"


def _failure(name: str, note: str) -> Verdict:
    return Verdict(name, False, float("nan"), float("nan"), float("nan"), float("nan"), note)


def _errors(got: Tensor, ref: Tensor) -> tuple[float, float]:
    diff = (got.to(torch.float64) - ref).abs()
    return diff.max().item(), diff.square().mean().sqrt().item()


def _kinds(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.isnan(t), torch.isposinf(t), torch.isneginf(t)


def judge(name: str, got: Tensor, ref: Tensor, eager: Sequence[Tensor], dtype: torch.dtype) -> Verdict:
    """The law for one tensor.

    Args:
        got: ours.  ref: the same in float64.  eager: eager PyTorch's, one per memory format.
        dtype: the dtype under test, whose eps the bound uses.

    NaN and Inf must stand where at least one eager result has them, the float64 one included (a library may skip
    products with padding, which another multiplies by zero); finite values are compared where all are finite.

    Raises:
        TypeError: ``ref`` is not float64.
    """
    if ref.dtype != torch.float64:
        raise TypeError(f"judge: ref of {name}: expected float64, got {ref.dtype}")
    if got.shape != ref.shape:
        return _failure(name, f"shape {tuple(got.shape)}, expected {tuple(ref.shape)}")
    finite = torch.isfinite(ref)
    for other in eager:
        finite = finite & torch.isfinite(other)
    if not bool(finite.all() and torch.isfinite(got).all()):
        ours = _kinds(got)
        if not any(all(map(torch.equal, ours, _kinds(other))) for other in (ref, *eager)):
            return _failure(name, "NaN or Inf where no eager result has it, or missing where all have it")
    if not bool(finite.any()):
        return Verdict(name, True, 0.0, 0.0, 0.0, 0.0)
    ref = torch.where(finite, ref, 0.0)
    worst = [max(e) for e in zip(*(_errors(torch.where(finite, t, 0.0), ref) for t in eager))]
    ours_errors = _errors(torch.where(finite, got, 0.0), ref)
    sizes = (ref.abs().max().item(), ref.square().mean().sqrt().item())
    eps = torch.finfo(dtype).eps
    forms = []
    for error, eager_error, size in zip(ours_errors, worst, sizes):
        bound = EAGER_FACTOR * eager_error + EPS_FACTOR * eps * size
        forms.append(Verdict(name, error <= bound, error, bound, eager_error, size))
    return next((form for form in forms if not form.passed), forms[0])


def judge_all(
    got: Mapping[str, Tensor], ref: Mapping[str, Tensor], eager: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> list[Verdict]:
    """`judge` for every named tensor; a name that is missing on either side fails."""
    verdicts = [_failure(name, "present on one side only") for name in sorted(set(got) ^ set(ref))]
    for name in ref:
        if name in got:
            verdicts.append(judge(name, got[name], ref[name], [e[name] for e in eager], dtype))
    return verdicts


def assert_law(
    got: Mapping[str, Tensor], ref: Mapping[str, Tensor], eager: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> None:
    """Raise AssertionError naming every tensor that breaks the law."""
    broken = [str(v) for v in judge_all(got, ref, eager, dtype) if not v.passed]
    if broken:
        raise AssertionError("\n".join(broken))
